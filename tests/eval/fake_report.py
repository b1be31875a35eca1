"""A made-up report, complete in its keys, for the tests of the page."""

import base64
import io
import math
import random

from PIL import Image

from eval.scoring import wilson_interval
from eval.verdict import verdict

KINDS = {
    "presence": (0.97, 0.5),
    "position": (0.93, 0.2),
    "relation": (0.9, 0.5),
    "count": (0.92, 0.24),
    "colour": (0.95, 0.17),
    "read": (0.88, 0.02),
}
CONTEXTS = (256, 512, 1024, 2048, 4096, 8192, 16384)


def make_report(quick: bool = False, shift: float = 0.0) -> dict:
    """A report with everything that `eval.report.collect` gives; `shift` moves the first model's
    accuracy."""
    random.seed(0)
    report = {
        "format": 3,
        "quick": quick,
        "created": "2026-01-02 03:04 UTC",
        "settings": {"scenes": 6000, "test_scenes": 400, "finetune_steps": 2000, "seed": 0},
        "environment": _environment(),
        "models": {
            "cobra": _model("Cobra", "Mamba-2 layers", True, 610_000),
            "transformer": _model("Transformer", "attention and MLP layers", False, 602_000),
        },
        "training": {"cobra": _stages(1.0), "transformer": _stages(1.15)},
        "accuracy": {"cobra": _accuracy(shift), "transformer": _accuracy(-0.02)},
        "comparison": {
            "first": "cobra",
            "second": "transformer",
            "difference": 0.012,
            "low": -0.004,
            "high": 0.028,
            "n": 2300,
        },
        "efficiency": _efficiency(),
        "scan": {"order": "cross4", "height": 8, "width": 8},
        "examples": [_example(i) for i in range(4)],
        "peak_rss_bytes": 1_500_000_000,
        "seconds": 590.0,
        "stages": [
            {"title": title, "seconds": seconds, "command": f"python -m train --recipe {title}"}
            for title, seconds in (
                ("Draw the scenes", 21),
                ("Pretrain the tower", 130),
                ("Cobra: finetune", 420),
                ("Transformer: finetune", 380),
            )
        ],
    }
    report["verdict"] = verdict(report)
    return report


def _environment() -> dict:
    return {
        "device": "cpu",
        "cpu": "Some CPU @ 2.0GHz",
        "cores": 2,
        "threads": 2,
        "memory_bytes": 8 << 30,
        "gpu": None,
        "system": "Linux x86_64",
        "python": "3.11.7",
        "versions": {"torch": "2.15.0"},
        "commit": "0123456789ab",
        "backend": {"ssd": {"cpu": "reference", "cuda": "reference", "why": "", "fallbacks": 0}},
    }


def _model(name: str, what: str, constant_state: bool, lm: int) -> dict:
    parameters = {"vision_encoder": 210_000, "connector": 160_000, "lm": lm}
    return {"name": name, "what": what, "constant_state": constant_state, "parameters": parameters}


def _stages(scale: float) -> list[dict]:
    def curve(steps: int, start: float, floor: float) -> list[list[float]]:
        return [
            [
                step,
                scale * (floor + start * math.exp(-step / (steps / 5))) * random.uniform(0.85, 1.15),
            ]
            for step in range(0, steps, 5)
        ]

    return [
        {"stage": "align", "points": curve(200, 3, 0.9)},
        {"stage": "finetune", "points": curve(2000, 1, 0.08)},
    ]


def _accuracy(shift: float) -> dict:
    def share(value: float, count: int) -> dict:
        return {
            "accuracy": value,
            "interval": wilson_interval(value * count, count),
            "count": count,
        }

    def part(index: int, moved: float) -> dict:
        groups = {kind: share(values[index] + moved, 380) for kind, values in KINDS.items()}
        mean = sum(group["accuracy"] for group in groups.values()) / len(groups)
        return {**share(mean, 380 * len(groups)), "groups": groups}

    return {"questions": part(0, shift), "control": part(1, 0.0)}


def _efficiency() -> dict:
    def spread(value: float) -> dict:
        return {"median": value, "q1": value * 0.97, "q3": value * 1.05, "n": 9}

    def model(decode, ttft, size) -> dict:
        points = [
            {
                "context": c,
                "decode_s": spread(decode(c)),
                "ttft_s": spread(ttft(c)),
                "roofline": 0.3,
                "state_bytes": size(c),
            }
            for c in CONTEXTS
        ]
        check = {
            "what": "logits",
            "tokens": 8,
            "errors": {"256": 2e-6, "16384": 3e-6},
            "tolerance": 1e-4,
            "passed": True,
        }
        return {
            "lm_parameters": 610_000,
            "weight_bytes": 2_440_000,
            "check": check,
            "points": points,
        }

    return {
        "format": 2,
        "protocol": {
            "contexts": list(CONTEXTS),
            "rounds": 9,
            "prefill_rounds": 3,
            "decode_tokens": 24,
            "warmup_tokens": 4,
        },
        "environment": _environment(),
        "read_bytes_per_s": 4.4e10,
        "dtype": "float32",
        "models": {
            "cobra": model(
                lambda c: 1.1e-3 * random.uniform(0.98, 1.02), lambda c: c * 6e-5, lambda c: 150_000
            ),
            "transformer": model(
                lambda c: 6e-4 + c * 2.2e-7, lambda c: c * 3e-5 + c * c * 4e-9, lambda c: c * 2048
            ),
        },
        "crossovers": [
            {
                "first": "cobra",
                "second": "transformer",
                "kind": "at",
                "context": 2310.4,
                "shortest": 256,
                "longest": 16384,
            }
        ],
        "peak_rss_bytes": 1 << 30,
    }


def _example(seed: int) -> dict:
    image = Image.linear_gradient("L").resize((64, 64)).rotate(90 * seed).convert("RGB")
    png = io.BytesIO()
    image.save(png, format="png")
    rows = [
        {
            "kind": kind,
            "question": question,
            "truth": truth,
            "answers": {
                key: {"answer": answer, "right": answer == truth}
                for key, answer in zip(("cobra", "transformer"), answers, strict=True)
            },
        }
        for kind, question, truth, answers in (
            ("presence", "Is there a 7 in the picture?", "yes", ("yes", "yes")),
            ("position", "Which digit is left of the 7?", "3", ("3", "5")),
            ("colour", "What colour is the 3?", "magenta", ("magenta", "magenta")),
            ("read", "Read the digits from left to right.", "3 7 1 <4>", ("3 7 1", "3 7 1 <4>")),
        )
    ]
    return {
        "image": "data:image/png;base64," + base64.b64encode(png.getvalue()).decode(),
        "rows": rows,
    }
