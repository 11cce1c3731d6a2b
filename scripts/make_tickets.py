"""Write rows of one's own for docs/handing_over.md: letters to a shop, each with the line that its clerks make of it.

    python scripts/make_tickets.py FOLDER

writes `train.jsonl` (200 rows), `test.jsonl` (60 rows) and `tickets.yaml`, a task of lm-evaluation-harness on the test
rows, the same bytes every time. A row is a letter and an answer such as
`{"team": "returns", "product": "kettle", "urgent": true}`.

Test rows tell of complaints in sentences that no training row has, and every other one of a product that none has: the
form can be learned by heart, the team and the product cannot.
"""

import argparse
import json
import random
from pathlib import Path

TRAINING_ROWS, TEST_ROWS = 200, 60
COMPLAINTS = {
    "billing": (
        "I was charged twice for the {product}.",
        "The invoice for the {product} shows the wrong amount.",
        "My card was billed for a {product} that I never bought.",
        "The price of the {product} on the bill is higher than in the shop.",
        "Where do I find the receipt for my {product}?",
    ),
    "delivery": (
        "The {product} has not arrived yet.",
        "The tracking page of my {product} has not changed for a week.",
        "The courier left the {product} at the wrong house.",
        "When will the {product} be shipped?",
        "The parcel with the {product} is lost.",
    ),
    "returns": (
        "The {product} came with a crack, and I want to send it back.",
        "I would like to return the {product}.",
        "You sent me a {product} in the wrong color; please exchange it.",
        "How do I send the {product} back?",
        "I have changed my mind about the {product} and want to give it back.",
    ),
    "repairs": (
        "The {product} no longer turns on.",
        "The {product} makes a strange noise when it runs.",
        "A part of the {product} broke after a month; can you mend it?",
        "The {product} stops after a minute.",
        "The switch of the {product} is stuck.",
    ),
}
TEST_COMPLAINTS = {
    "billing": ("You charged me two times for the {product}.", "The bill for my {product} is wrong."),
    "delivery": ("My {product} still has not arrived.", "The courier never brought the {product}."),
    "returns": ("I want to return this {product}.", "Please let me send the {product} back."),
    "repairs": ("My {product} does not turn on.", "The {product} broke; can you mend it?"),
}
PRODUCTS = [
    "kettle",
    "toaster",
    "lamp",
    "blender",
    "radio",
    "heater",
    "fan",
    "clock",
    "camera",
    "printer",
    "oven",
    "freezer",
]
TEST_PRODUCTS = ["scale", "mixer", "drill", "grill"]
GREETINGS = ("Hello,", "Hi!", "Good morning.", "Dear shop,", "To whom it may concern:", "")
URGENT = {
    True: (
        "Please answer today.",
        "This is urgent.",
        "I need it by tomorrow.",
        "I cannot wait any longer.",
        "Please hurry.",
    ),
    False: ("There is no hurry.", "Answer when you have time.", "Thank you.", "Kind regards.", ""),
}
TASK = """# A task of lm-evaluation-harness on rows of one's own: an answer is right where it equals the row's.
task: tickets
dataset_path: json
dataset_kwargs: {{data_files: {{test: {rows}}}}}
test_split: test
output_type: generate_until
generation_kwargs: {{until: ["\\n\\n"], max_gen_toks: 40, do_sample: false}}
doc_to_text: "{{{{messages[0].content}}}}"
doc_to_target: "{{{{messages[1].content}}}}"
metric_list: [{{metric: exact_match, aggregation: mean, higher_is_better: true}}]
"""

Row = dict[str, list[dict[str, str]]]


def draw_rows(random_source: random.Random, count: int, *, test: bool) -> list[Row]:
    """Distinct letters with their answers, the teams in turn."""
    complaints = TEST_COMPLAINTS if test else COMPLAINTS
    rows: dict[str, Row] = {}
    while len(rows) < count:
        team = list(complaints)[len(rows) % len(complaints)]
        product = random_source.choice(TEST_PRODUCTS if test and len(rows) // 4 % 2 else PRODUCTS)
        urgent = random_source.random() < 0.5
        parts = (
            random_source.choice(GREETINGS),
            random_source.choice(complaints[team]).format(product=product),
            random_source.choice(URGENT[urgent]),
        )
        letter = " ".join(part for part in parts if part)
        answer = json.dumps({"team": team, "product": product, "urgent": urgent})
        rows[letter] = {
            "messages": [{"role": "user", "content": letter}, {"role": "assistant", "content": answer}]
        }
    return list(rows.values())


def make(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, count in (("train", TRAINING_ROWS), ("test", TEST_ROWS)):
        rows = draw_rows(random.Random(name), count, test=name == "test")
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{name}.jsonl").write_text(lines, encoding="utf-8")
    (folder / "tickets.yaml").write_text(TASK.format(rows=folder / "test.jsonl"), encoding="utf-8")


def main() -> None:
    options = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    options.add_argument("folder", type=Path, help="folder to create for the rows")
    folder = options.parse_args().folder
    make(folder)
    print(f"{folder}: {TRAINING_ROWS} rows to train on, {TEST_ROWS} to test on, and a task on these")


if __name__ == "__main__":
    main()
