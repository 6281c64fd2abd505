"""A routing testbed: small MoE models trained on clearly separable domains, beside a router that knows the domains.

The functions ``train`` and ``compare`` stand here in the place of the modules they come from.
"""

from moe_interp.testbed.compare import compare
from moe_interp.testbed.comparison import ComparisonResult
from moe_interp.testbed.config import TestbedConfig
from moe_interp.testbed.domains.domain import Domain, Item
from moe_interp.testbed.metrics import routing_metrics
from moe_interp.testbed.model import ModelConfig
from moe_interp.testbed.presets import PRESETS
from moe_interp.testbed.strategies.table import STRATEGIES
from moe_interp.testbed.training.train import TrainedRun, train

__all__ = [
    "PRESETS",
    "STRATEGIES",
    "ComparisonResult",
    "Domain",
    "Item",
    "ModelConfig",
    "TestbedConfig",
    "TrainedRun",
    "compare",
    "routing_metrics",
    "train",
]
