"""Measuring a model: task scores through lm-eval, statistics, and the sandbox that runs generated programs.

settings.py       EvalSettings: how a model answers
tasks.py          which tasks there are, what is checked before weights are read, evaluate()
benchmarks.py     the published tasks (benchmarks.yaml), as the installed lm-eval defines them
task_data.py      their local files: what goes where, what is wrong with it
task_settings.py  published settings per model and task (task_settings.yaml) and the scores they gave
math_answers.py   whether two final answers of MATH are equal
harness.py        DiffusionLM, the model as lm-eval sees it (imports lm-eval: seconds)
plugin.py         the same under the name `dllmq` in lm-eval's registry and on its command line
code_scoring.py   responses to code tasks -> programs -> pass@1
sandbox.py        runs one program in a process of its own
fidelity.py       KL divergence and top-1 agreement on held-out full-precision states
statistics.py     means, paired differences, standard errors
task_configs/     one lm-eval YAML a generated task
"""
