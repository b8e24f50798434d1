"""The W&B dashboard over a project's trainings; needs `pip install -e .[wandb]`.

python -m src.dashboard entity=TEAM project=hyperdflash                logged in: saves the workspace and prints its address
python -m src.dashboard entity=TEAM file=workspace.json                 without an account: what would be sent

`python -m src.report` makes the same page without W&B.
"""

from __future__ import annotations

from hyperdflash.commands import dashboard as main

if __name__ == "__main__":
    main()
