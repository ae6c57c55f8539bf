"""`python -m dllmq.bench`: speed and memory as ratios of two things measured in the same run.

    timing      interleaved repeats (A B A B ...), a ratio per round
    rows        what one comparison leaves behind, and the results.json they are kept in
    shapes      the models that are measured; reference_loop, textbook_gptq: what they are compared with
    generate, quantize, linear, evaluate, memory    the sections (sections.py: by name, and how one is run)
    table, figure, page, study    what is made of results.json

Nothing here needs hydra; lm-eval only for the section `evaluate`, matplotlib only for figures.
"""
