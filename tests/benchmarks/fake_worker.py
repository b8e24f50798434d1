"""A worker of the bench that computes nothing: python fake_worker.py NAME SECONDS LOG [MODE].

Modes: full, wrong, dies, no_peak.
"""

import json
import os
import sys

sys.path.insert(0, os.getcwd())
from benchmarks.flops import products
from benchmarks.shapes import Case, StepShape

name, seconds, log, mode = sys.argv[1], float(sys.argv[2]), sys.argv[3], (sys.argv[4:] or ["fine"])[0]
steps = 0
for line in sys.stdin:
    request = json.loads(line)
    with open(log, "a") as file:
        file.write(json.dumps([name, request["do"], request.get("anchors")]) + "\n")
    if request["do"] == "build":
        shape = request["shape"]
        case = Case(StepShape(**shape), request["dtype"], request["objective"])
        answer = {"versions": {"fake": "1"}}
    elif request["do"] == "step":
        steps += 1
        if mode == "dies":
            sys.exit("Traceback\n\nValueError: the last line")
        slots = shape["num_anchors"] * (shape["block_size"] - 1) - (mode == "wrong")
        stages = dict.fromkeys(("anchors", "draft", "loss", "backward"), seconds / 4)
        answer = {"seconds": seconds * steps, "stages": stages, "loss": 1.0, "anchors": shape["num_anchors"], "slots": slots}
        if mode == "full":
            answer = {"error": "can't allocate memory"}
    elif request["do"] == "memory":
        answer = {"peak_bytes": 100_000_000 + int(seconds * 1e9), "imports_bytes": 100_000_000}
    elif request["do"] == "rates":
        named = [(product.name, part) for product in products(case) for part in product.parts]
        answer = {
            "rates": [{"name": n, "part": p, "sizes": [1, i, 1, 1], "flops_per_s": i} for i, (n, p) in enumerate(named, 1)]
        }
    elif request["do"] == "peak":
        answer = {"error": "no room"} if mode == "no_peak" else {"flops_per_s": request["sizes"][1] / steps}
    print(json.dumps(answer), flush=True)
