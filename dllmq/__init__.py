"""Post-training quantization of diffusion language models.

config -> model -> calibration states -> quantized model -> measurements -> record
"""

from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

try:
    __version__ = version("dllmq")
except PackageNotFoundError:  # a checkout that was never installed
    __version__ = "0+checkout"

# setuptools installs conf/ as dllmq.conf. In a checkout it still lies beside this package: look there too,
# so that `python -m dllmq.run` needs no install.
_checkout = Path(__file__).resolve().parent.parent
if (_checkout / "pyproject.toml").is_file() and (_checkout / "conf" / "__init__.py").is_file():
    __path__.append(str(_checkout))
