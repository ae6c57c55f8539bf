"""LLaDA and Dream as transformers' classes, for programs that load through its Auto classes.

    import dllmq.models.hf
    from transformers import AutoModel
    model = AutoModel.from_pretrained(folder, dtype=torch.float32)

The import registers them; no code of the checkpoint runs. They hold the native models' own modules under the
published names, so transformers' quantizers (compressed-tensors) find the linears. With asymmetric packed
weights pass quantization_config=CompressedTensorsConfig(dequantize=True), which leaves the inputs in full
precision: compressed-tensors 0.20 does not expect packed zero points otherwise.

Inputs on symmetric grids are quantized as here, bit for bit; on asymmetric ones compressed-tensors may round
a token's zero point to the neighbour.

What only our record knows (the attention product's grids, V's scales) is not applied here; `load_model` does.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModel, AutoModelForMaskedLM, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import MaskedLMOutput

from dllmq.models.dream import Dream, DreamConfig
from dllmq.models.llada import LLaDA, LLaDAConfig


class LLaDAHFConfig(PretrainedConfig):
    """LLaDA's config.json."""

    model_type = "llada"

    def __init__(self, **fields: Any) -> None:
        super().__init__(**fields)


class DreamHFConfig(PretrainedConfig):
    """Dream's config.json."""

    model_type = "Dream"

    def __init__(self, **fields: Any) -> None:
        super().__init__(**fields)


class NativeModel(PreTrainedModel):
    """A native model's modules as a PreTrainedModel; subclasses name the native classes."""

    native_config: ClassVar[Any]
    native_model: ClassVar[Any]

    def __init__(self, config: PretrainedConfig) -> None:
        super().__init__(config)
        native = self.native_model(self.native_config.from_dict(config.to_dict()))
        for name, child in native.named_children():
            self.add_module(name, child)
        self.__dict__["native"] = native  # not a child: its modules are ours already
        self.post_init()

    def _init_weights(self, module: Any) -> None:
        """Nothing is trained here."""

    @torch.no_grad()
    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, return_dict: bool = True
    ) -> Any:
        """Raw logits [B, L, E] for every position; Dream's are unshifted (column i predicts token i + 1)."""
        logits = self.native(input_ids, attention_mask)
        return MaskedLMOutput(logits=logits) if return_dict else (logits,)


class LLaDAModelLM(NativeModel):
    """LLaDA, natively."""

    config_class = LLaDAHFConfig
    native_config, native_model = LLaDAConfig, LLaDA


class DreamModel(NativeModel):
    """Dream, natively."""

    config_class = DreamHFConfig
    native_config, native_model = DreamConfig, Dream


for _config, _model in ((LLaDAHFConfig, LLaDAModelLM), (DreamHFConfig, DreamModel)):
    AutoConfig.register(_config.model_type, _config, exist_ok=True)
    for _auto in (AutoModel, AutoModelForMaskedLM):
        _auto.register(_config, _model, exist_ok=True)
