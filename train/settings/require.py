"""How settings refuse a value."""

from vision_scan.errors import UserError


def require(condition: bool, message: str) -> None:
    """Raises UserError with the message unless the condition holds."""
    if not condition:
        raise UserError(message)
