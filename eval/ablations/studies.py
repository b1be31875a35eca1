"""All studies."""

from collections.abc import Callable, Mapping

from eval.ablations import (
    backbones,
    connectors,
    directions_vs_depth,
    merge,
    needle,
    num_tokens,
    question_position,
    scan_orders,
)
from eval.ablations.trials import Study

# Name -> (levels, seeds) -> the study; None: the study's own levels and number of seeds.
ABLATIONS: Mapping[str, Callable[..., Study]] = {
    "scan_orders": scan_orders.study,
    "connectors": connectors.study,
    "merge": merge.study,
    "backbones": backbones.study,
    "num_tokens": num_tokens.study,
    "directions_vs_depth": directions_vs_depth.study,
    "question_position": question_position.study,
    "needle": needle.study,
}
