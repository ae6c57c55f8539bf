"""From the composed YAML to typed values, checked; the only place that reads the switches.

composed YAML -> loading.load -> schema.RunConfig -> .recipe(): values for the pipeline's slots
                                 checks.check_cell -> Plan: nothing wrong, no weight read
                                 fingerprints.fingerprint: what its numbers depend on
"""

from omegaconf import OmegaConf

from dllmq.config.checks import Plan, check_cell, device_of
from dllmq.config.composing import check_choices, compose_plan, preset_of, refused
from dllmq.config.fingerprints import (
    READ,
    batch_identity,
    code_digest,
    file_digest,
    fingerprint,
    fingerprint_of,
    fingerprint_parts,
    identity,
)
from dllmq.config.folders import cell_name, slug, sweep_folder
from dllmq.config.loading import load
from dllmq.config.reference import reference_config
from dllmq.config.schema import EMBEDDED, RunConfig
from dllmq.config.values import build, choose, did_you_mean

__all__ = [
    "EMBEDDED",
    "READ",
    "Plan",
    "RunConfig",
    "batch_identity",
    "build",
    "cell_name",
    "check_cell",
    "check_choices",
    "choose",
    "code_digest",
    "compose_plan",
    "device_of",
    "did_you_mean",
    "file_digest",
    "fingerprint",
    "fingerprint_of",
    "fingerprint_parts",
    "identity",
    "load",
    "preset_of",
    "reference_config",
    "refused",
    "slug",
    "sweep_folder",
]

OmegaConf.register_new_resolver("default", lambda value: value, replace=True)
OmegaConf.register_new_resolver("cell_name", cell_name, replace=True)
