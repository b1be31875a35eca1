"""All studies."""

from collections.abc import Callable, Mapping

from eval.ablations import scan_orders
from eval.ablations.trials import Study

# Name -> (levels, seeds) -> the study; None: all levels, and the study's own number of seeds.
ABLATIONS: Mapping[str, Callable[..., Study]] = {
    "scan_orders": scan_orders.study,
}
