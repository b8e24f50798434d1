"""SGLang's models of this package: SGLANG_EXTERNAL_MODEL_PACKAGE=hyperdflash_sglang (docs/serving.md).

    target.py    DeepSeek-V4 whose auxiliary states for DFLASH are its residual before hc_head, [N, M * D]
    draft.py     a DFlash drafter whose reducer is the gate over the residual's paths

Written from the source of SGLang 0.5.23 and never run, since SGLang has no build for a CPU.
"""
