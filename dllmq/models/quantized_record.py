"""Our record of a quantized folder."""

RECORD = "dllmq_quantization.json"
