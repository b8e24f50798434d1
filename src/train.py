"""Train a drafter.

python -m src.train experiment=stage1
python -m src.train experiment=stage2 reducer=hc_gate kl.alpha=0.15
python -m src.train -m experiment=stage1 reducer=hc_gate,fc kl.alpha=0,0.15
python -m src.train -m experiment=stage1 reducer=hc_gate,fc kl.alpha=0,0.15 trainer=ddp_cpu trainer.devices=2
python -m src.train experiment=stage1 method=dflash              vanilla DFlash
python -m src.train experiment=stage1 method=mtp_finetuned       the native MTP block, fine-tuned
"""

from __future__ import annotations

from hyperdflash.commands import train as main

if __name__ == "__main__":
    main()
