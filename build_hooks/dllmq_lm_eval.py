"""Makes `lm_eval run --model dllmq` find dllmq: adds its name to lm-eval's registry when lm-eval fills it.

lm-eval up to 0.4.13 only knows the models of its own source tree (later versions read the entry point group
`lm_eval.models`). dllmq_lm_eval.pth beside this file is read when Python starts and imports it. All it does
then is wait for an import of `lm_eval.models`: nothing of lm-eval or dllmq is imported before, and a Python
that never imports lm-eval never gets further than the class below.
"""

import sys

NAME, TARGET = "dllmq", "dllmq.evaluation.plugin:DllmqLM"


class _WhenRegistryIsFilled:
    """A finder that finds nothing itself: it lets the others find lm_eval.models, and follows its loader."""

    def find_spec(self, fullname, path=None, target=None):  # type: ignore[no-untyped-def]
        if fullname != "lm_eval.models":
            return None
        sys.meta_path.remove(self)
        from importlib.util import find_spec

        spec = find_spec(fullname)
        if spec is not None and spec.loader is not None:
            spec.loader.exec_module = _then_register(spec.loader.exec_module)  # type: ignore[method-assign]
        return spec


def _then_register(execute):  # type: ignore[no-untyped-def]
    def exec_module(module):  # type: ignore[no-untyped-def]
        execute(module)
        try:
            from lm_eval.api.registry import model_registry

            if NAME not in model_registry:
                model_registry.register(NAME, target=TARGET)
        except (ImportError, AttributeError, TypeError):
            pass  # a version with another registry, which then reads the entry point

    return exec_module


sys.meta_path.insert(0, _WhenRegistryIsFilled())  # type: ignore[arg-type]
