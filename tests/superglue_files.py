"""Made-up rows of every SuperGLUE task, in the layout of the official files and in that of the hub."""

from tiny_files import write_jsonl

OFFICIAL = {
    "rte": {"premise": "It rains.", "hypothesis": "It is wet.", "label": "entailment", "idx": 0},
    "boolq": {"passage": "The sea is salt.", "question": "is the sea salt", "label": True, "idx": 0},
    "wsc": {"text": "Ann saw Bea when she left.", "target": {"span1_text": "Ann", "span2_text": "she", "span1_index": 0, "span2_index": 4}, "label": False, "idx": 0},
    "wic": {"word": "bank", "sentence1": "A river bank.", "sentence2": "A bank note.", "label": False, "idx": 0, "start1": 8, "end1": 12, "start2": 2, "end2": 6, "version": 1.1},
    "multirc": {
        "idx": 0,
        "passage": {
            "text": "Tom ate.",
            "questions": [
                {"question": "Who ate?", "idx": 0, "answers": [{"text": "Tom", "idx": 0, "label": 1}, {"text": "Ann", "idx": 1, "label": 0}]},
                {"question": "What did he do?", "idx": 1, "answers": [{"text": "eat", "idx": 2, "label": 1}]},
            ],
        },
    },
    "copa": {"premise": "The ice melted.", "choice1": "It was warm.", "choice2": "It was cold.", "question": "cause", "label": 0, "idx": 0},
    "cb": {"premise": "Maybe he came.", "hypothesis": "He came.", "label": "neutral", "idx": 0},
}  # fmt: skip
HUB = {
    "rte": [{"premise": "It rains.", "hypothesis": "It is wet.", "label": 0}],
    "boolq": [{"passage": "The sea is salt.", "question": "is the sea salt", "label": 1}],
    "wsc": [{"text": "Ann saw Bea when she left.", "span1_text": "Ann", "span2_text": "she", "span1_index": 0, "span2_index": 4, "label": 0}],
    "wic": [{"word": "bank", "sentence1": "A river bank.", "sentence2": "A bank note.", "label": 0}],
    "multirc": [
        {"paragraph": "Tom ate.", "question": "Who ate?", "answer": "Tom", "label": 1},
        {"paragraph": "Tom ate.", "question": "Who ate?", "answer": "Ann", "label": 0},
        {"paragraph": "Tom ate.", "question": "What did he do?", "answer": "eat", "label": 1},
    ],
    "copa": [{"premise": "The ice melted.", "choice1": "It was warm.", "choice2": "It was cold.", "question": "cause", "label": 0}],
    "cb": [{"premise": "Maybe he came.", "hypothesis": "He came.", "label": 2}],
}  # fmt: skip


def write_rte(folder, num_train=40, num_val=20):
    """RTE files in which the right answer is written in the premise, so that a tiny model can learn it."""
    (folder / "RTE").mkdir(parents=True)
    for name, count in (("train", num_train), ("val", num_val)):
        rows = [
            {"premise": "y" if index % 3 else "n", "hypothesis": "h", "label": "entailment" if index % 3 else "not_entailment", "idx": index}
            for index in range(count)
        ]  # fmt: skip
        write_jsonl(folder / "RTE" / f"{name}.jsonl", rows)
    return folder
