"""Quantization methods, one baseline a file: how the weights of a group of linears become codes."""

from dllmq.methods.awq import AWQ
from dllmq.methods.base import GroupUpdate, Method
from dllmq.methods.fp import FP
from dllmq.methods.gptq import GPTQ
from dllmq.methods.rtn import RTN

__all__ = ["AWQ", "FP", "GPTQ", "RTN", "GroupUpdate", "Method"]
