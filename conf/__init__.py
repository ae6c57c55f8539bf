"""Configuration read by Hydra; installed as ``dllmq.conf``."""
