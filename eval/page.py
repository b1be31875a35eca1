"""report.json -> one self-contained HTML page: no script, no font, no picture from elsewhere."""

import base64
import io
from pathlib import Path

import vision_scan
from eval import figures
from eval.efficiency import crossover_sentence
from eval.markup import (
    Markup,
    count,
    definitions,
    details,
    duration,
    figure,
    join,
    seconds,
    section,
    size,
    table,
    tag,
)
from vision_scan.draw import draw_order

BADGES = {True: ("reached", "reached"), False: ("missed", "not reached"), None: ("finding",) * 2}


def render(report: dict) -> str:
    """The page for a report, see `eval.report.collect` for its keys."""
    names = {key: model["name"] for key, model in report["models"].items()}
    sections = [
        _header(report, names),
        _verdict(report["verdict"]),
        _answers(report["accuracy"], names),
        _examples(report["examples"], names),
        _decoding(report["efficiency"], names),
        _training(report, names),
        _scan(report["scan"]),
        _settings(report),
    ]
    return _page("Cobra: quick run" if report["quick"] else "Cobra: demo report", sections)


def render_efficiency(result: dict) -> str:
    """The page for a result of `eval.efficiency.measure` alone."""
    title = "How fast it answers"
    machine = section("Measured on", "", definitions(_machine(result["environment"])))
    names = {name: name for name in result["models"]}
    return _page(title, [tag("h1", title), _decoding(result, names), machine])


def _page(title: str, sections: list[Markup]) -> str:
    style = Markup(Path(__file__).with_name("report.css").read_text(encoding="utf-8"))
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("title", title),
        tag("style", style),
    )
    body = tag("body", tag("main", *sections))
    return "<!doctype html>\n" + tag("html", head, body, lang="en") + "\n"


def _header(report: dict, names: dict[str, str]) -> Markup:
    models = [join((tag("b", name), f" ({report['models'][key]['what']})")) for key, name in names.items()]
    lead = tag(
        "p",
        "Two vision-language models that differ only in their language layers, ",
        join((models[0], " and ", models[1])),
        ", trained from nothing on the same pictures in the same order, on ",
        f"{_hardware(report['environment'])}: {duration(report['seconds'])} for everything "
        "on this page.",
    )
    title, banner = "Pictures in, answers out", Markup()
    if report["quick"]:
        title += ": the quick run"
        banner = tag(
            "p",
            tag("b", "This is the quick run. "),
            "It walks the whole path with few training steps, so its models have learnt little. ",
            tag("code", "make demo"),
            " makes the figures that count.",
            class_="banner",
        )
    return tag("header", tag("h1", title), lead, banner, _numbers(report, names))


def _numbers(report: dict, names: dict[str, str]) -> Markup:
    """The headline figures as cards."""
    cards = []
    for key, name in names.items():
        right, blind = (report["accuracy"][key][part]["accuracy"] for part in ("questions", "control"))
        cards.append((f"{right:.1%}", f"{name}: right on unseen scans ({blind:.1%} blind)"))
    for key, result in report["efficiency"]["models"].items():
        first, last = result["points"][0], result["points"][-1]
        context = count(last["context"], "token")
        if report["models"][key]["constant_state"]:
            ratio = last["decode_s"]["median"] / first["decode_s"]["median"]
            against = f"time per token at {context}, against {first['context']:,}"
            cards.append((f"× {ratio:.2f}", f"{names[key]}: {against}"))
            cards.append((size(last["state_bytes"]), f"{names[key]}: its memory at any length"))
        else:
            cards.append((size(last["state_bytes"]), f"{names[key]}: its memory at {context}"))
    drawn = (tag("div", tag("strong", value), tag("span", label), class_="card") for value, label in cards)
    return tag("div", *drawn, class_="numbers")


def _verdict(rows: list[dict]) -> Markup:
    items = []
    for row in rows:
        style, word = BADGES[row["reached"]]
        items.append(
            tag(
                "li",
                tag("span", word, class_=f"badge {style}"),
                tag("span", row["claim"]),
                tag("span", row["measured"], class_="measured"),
            )
        )
    lead = "Computed from this run's own numbers."
    return section("What was to be shown", lead, tag("ul", *items, class_="verdict"))


def _answers(accuracy: dict, names: dict[str, str]) -> Markup:
    parts = ("questions", "control")
    kinds = list(next(iter(accuracy.values()))["questions"]["groups"])
    labels = ["all questions", *kinds]
    drawn = {
        names[key]: {
            part: [result[part], *(result[part]["groups"][kind] for kind in kinds)] for part in parts
        }
        for key, result in accuracy.items()
    }
    bars = figure(
        figures.accuracy_bars(labels, drawn),
        "Pale: right with a black image in place of the picture, which is what language alone "
        "gives. Full colour: what seeing adds. Lines: 95 percent intervals.",
    )
    rows = []
    for i, label in enumerate(labels):
        results = [result[part][i] for result in drawn.values() for part in parts]
        shares = [f"{100 * result['accuracy']:.1f}" for result in results]
        rows.append([label, f"{results[0]['count']:,}", *shares])
    heads = ["kind", "questions", *(head for name in drawn for head in (name, "blank"))]
    lead = "Every question is about a scene whose handwritten digits no training picture holds."
    return section("Answers", lead, tag("div", bars, table(heads, rows), class_="pair"))


def _examples(examples: list[dict], names: dict[str, str]) -> Markup:
    cards = []
    for example in examples:
        items = []
        for row in example["rows"]:
            answers = row["answers"]
            all_right = all(answer["right"] for answer in answers.values())
            truth = Markup() if all_right else join((" ", tag("b", row["truth"])))
            given = (_answer(names[key], **answer) for key, answer in answers.items())
            items.append(tag("li", row["question"], truth, tag("br"), *given))
        picture = tag("img", alt="digit scene", src=example["image"])
        cards.append(tag("div", picture, tag("ol", *items), class_="card example"))
    lead = (
        "The first scenes of the test set, not chosen, as the models see them. Green answers are "
        "right; where one is wrong, the truth stands in bold."
    )
    return section("Examples", lead, tag("div", *cards, class_="examples"))


def _answer(name: str, answer: str, right: bool) -> Markup:
    mark, style = ("✓", "right") if right else ("✗", "wrong")
    text = f"{mark} {answer or '(nothing)'} "
    return tag("span", text, tag("small", name), class_=f"answer {style}")


def _decoding(efficiency: dict, names: dict[str, str]) -> Markup:
    points = {names[key]: result["points"] for key, result in efficiency["models"].items()}

    def curves(values) -> dict[str, list[dict]]:
        return {
            name: [{"context": point["context"], **values(point)} for point in row]
            for name, row in points.items()
        }

    draw = figures.curves_against_context
    drawn = [
        draw(curves(lambda point: point["decode_s"]), "time per token", seconds),
        draw(curves(lambda point: point["ttft_s"]), "time to first token", seconds),
        draw(curves(lambda p: {"median": p["state_bytes"]}), "size of the state or cache", size),
    ]
    crossings = []
    for found in efficiency["crossovers"]:
        named = {side: names[found[side]] for side in ("first", "second")}
        sentence = crossover_sentence(found | named)
        crossings.append(tag("p", tag("b", f"{sentence[0].upper()}{sentence[1:]}.")))
    columns = ("ms per token (quartiles)", "of roofline", "first token", "state")
    heads = ["context", *(f"{name}: {what}" for name in points for what in columns)]
    rows = [
        [f"{context:,}", *(cell for row in points.values() for cell in _cells(row[i]))]
        for i, context in enumerate(efficiency["protocol"]["contexts"])
    ]
    return section(
        "Decoding against context length",
        _protocol(efficiency),
        *crossings,
        tag("div", *map(figure, drawn), class_="triple"),
        details("The numbers", table(heads, rows)),
    )


def _protocol(efficiency: dict) -> str:
    protocol, threads = efficiency["protocol"], efficiency["environment"]["threads"]
    return (
        f"The language model alone on random tokens, batch 1, {efficiency['dtype']}, "
        f"{count(threads, 'thread')}; medians of {count(protocol['rounds'], 'interleaved repeat')} "
        f"of {count(protocol['decode_tokens'], 'token')} after {protocol['warmup_tokens']} of "
        f"warm-up ({count(protocol['prefill_rounds'], 'repeat')} for the first token); shaded: "
        "quartiles. Roofline: weights and state at the speed at which this machine reads memory, "
        f"{efficiency['read_bytes_per_s'] / 1e9:.0f} GB/s; what a cache holds can be read faster."
    )


def _cells(point: dict) -> tuple[str, str, str, str]:
    q1, median, q3 = (f"{1e3 * point['decode_s'][key]:.2f}" for key in ("q1", "median", "q3"))
    first = seconds(point["ttft_s"]["median"])
    return f"{median} ({q1} to {q3})", f"{point['roofline']:.0%}", first, size(point["state_bytes"])


def _training(report: dict, names: dict[str, str]) -> Markup:
    drawing = figures.loss_curves({names[key]: stages for key, stages in report["training"].items()})
    caption = "Thin: every logged step; thick: moving average. Same data, same order, same steps."
    models = [model["parameters"] for model in report["models"].values()]
    labels = {"vision_encoder": "vision encoder", "lm": "language model"}
    rows = [[labels.get(part, part), *(f"{m[part]:,}" for m in models)] for part in models[0]]
    rows.append(["together", *(f"{sum(m.values()):,}" for m in models)])
    parameters = table(["parameters", *names.values()], rows)

    stages = report["stages"]
    longest = max(stage["seconds"] for stage in stages)
    bars = []
    for stage in stages:
        share = f"width:{max(1, 100 * stage['seconds'] / longest):.0f}%"
        length = duration(stage["seconds"])
        bars += [tag("span", stage["title"]), tag("i", style=share), tag("span", length)]
    return section(
        "Training",
        "The small vision tower is trained first and shared; then each model is aligned and finetuned.",
        tag("div", figure(drawing, caption), parameters, class_="pair"),
        details(
            f"Time of each step; the two models side by side, {duration(report['seconds'])} in all",
            tag("div", *bars, class_="times"),
            is_open=True,
        ),
    )


def _scan(scan: dict) -> Markup:
    height, width = scan["height"], scan["width"]
    png = io.BytesIO()
    draw_order(vision_scan.order(scan["order"], height, width), cell=26).save(png, format="png")
    source = "data:image/png;base64," + base64.b64encode(png.getvalue()).decode()
    lead = (
        f"The connector reads the {height} × {width} patches of a picture along each of these "
        "paths, with a Mamba-2 scan, and merges what they found: before the language model starts, "
        "every patch has seen all others."
    )
    picture = tag("img", class_="sheet", alt=f"scan order {scan['order']}", src=source)
    return section("How a picture is read", lead, tag("div", picture, class_="scroll"))


def _settings(report: dict) -> Markup:
    settings = [f"{key.replace('_', ' ')} {value}" for key, value in report["settings"].items()]
    rows = [
        ("settings", ", ".join(settings)),
        *_machine(report["environment"]),
        ("made", report["created"]),
    ]
    commands = (tag("li", tag("code", stage["command"])) for stage in report["stages"])
    return section("Settings", "", definitions(rows), details("The commands, in order", tag("ol", *commands)))


def _machine(environment: dict) -> list[tuple[str, str]]:
    memory, threads = environment["memory_bytes"], count(environment["threads"], "thread")
    versions = [f"{package} {version}" for package, version in environment["versions"].items()]
    software = [f"Python {environment['python']}", *versions, environment["system"]]
    compiled = []
    for device in ("cpu", "cuda"):
        ops = [op for op, how in environment["backend"].items() if how[device] == "compiled"]
        compiled.append(f"{device}: {', '.join(ops) or 'none, the reference runs'}")
    return [
        ("hardware", f"{_hardware(environment)}, {size(memory)} of memory, {threads}"),
        ("software", ", ".join(software)),
        ("commit", environment["commit"] or "not a git checkout"),
        ("compiled ops", "; ".join(compiled)),
    ]


def _hardware(environment: dict) -> str:
    return environment["gpu"] or f"{count(environment['cores'], 'core')} of {environment['cpu']}"
