"""Answers as a worker of the step's benchmark without computing: python fake_worker.py NAME SECONDS LOG [MODE].

Modes: full, wrong, dies.
"""

import json
import sys

name, seconds, log, mode = sys.argv[1], float(sys.argv[2]), sys.argv[3], (sys.argv[4:] or ["fine"])[0]
steps = 0
for line in sys.stdin:
    request = json.loads(line)
    with open(log, "a") as file:
        file.write(json.dumps([name, request["do"], request.get("anchors")]) + "\n")
    if request["do"] == "build":
        shape = request["shape"]
        answer = {"versions": {"fake": "1"}}
    elif request["do"] == "step":
        steps += 1
        if mode == "dies":
            sys.exit("Traceback\n\nValueError: the last line")
        slots = shape["num_anchors"] * (shape["block_size"] - 1) - (mode == "wrong")
        answer = {"seconds": seconds * steps, "loss": 1.0, "anchors": shape["num_anchors"], "slots": slots}
        if mode == "full":
            answer = {"error": "can't allocate memory"}
    else:
        answer = {"peak_bytes": 100_000_000 + int(seconds * 1e9), "imports_bytes": 100_000_000}
    print(json.dumps(answer), flush=True)
