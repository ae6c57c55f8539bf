"""setuptools commands that put dllmq_lm_eval.pth into site-packages; no setting of setuptools can."""

from pathlib import Path
from typing import Any

from setuptools.command.build_py import build_py
from setuptools.command.editable_wheel import editable_wheel

PTH = Path(__file__).with_name("dllmq_lm_eval.pth")


class BuildPy(build_py):
    """Into a wheel's root."""

    def run(self) -> None:
        super().run()
        if not self.editable_mode:
            self.copy_file(str(PTH), str(Path(self.build_lib) / PTH.name), preserve_mode=False)

    def get_source_files(self) -> list[str]:
        """Into the sdist, with the commands themselves."""
        own = (PTH.name, Path(__file__).name)
        return [*super().get_source_files(), *(f"{PTH.parent.name}/{name}" for name in own)]


class EditableWheel(editable_wheel):
    """Into the small wheel that an editable install unpacks."""

    def _select_strategy(self, *arguments: Any) -> Any:
        strategy = super()._select_strategy(*arguments)
        return _WithPth(strategy)


class _WithPth:
    """setuptools' strategy, and one file more."""

    def __init__(self, strategy: Any) -> None:
        self.strategy = strategy

    def __enter__(self) -> "_WithPth":
        self.strategy.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self.strategy.__exit__(*error)

    def __call__(self, wheel: Any, files: list[str], mapping: dict[str, str]) -> None:
        self.strategy(wheel, files, mapping)
        wheel.writestr(PTH.name, PTH.read_text(encoding="utf-8"))
