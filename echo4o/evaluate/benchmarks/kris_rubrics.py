"""What KRIS-Bench asks its judge: consistency, quality, instruction, and knowledge where the edit needs it."""

from __future__ import annotations

from echo4o.evaluate.parsing import Answer, Number, Text

#: Question → the scores in its answer.
METRICS = {
    "consistency": ("consistency",),
    "quality": ("quality",),
    "instruction": ("instruction",),
    "knowledge": ("instruction", "knowledge"),
}
ANSWERS = {
    name: Answer(
        (
            *(Number(part, 1, 5, integer=True, aliases=(f"{part}_score",)) for part in parts),
            Text("reason", ("reasoning",)),
        )
    )
    for name, parts in METRICS.items()
}

_ASKS = {
    "consistency": (
        "consistency: is everything that the instruction does not change as it was: objects, background, style? "
        "1: hardly anything. 2: large parts are not. 3: noticeable changes. 4: small ones. 5: all of it."
    ),
    "quality": (
        "quality: is the image well made: natural, sharp where it should be, free of artifacts and broken shapes? "
        "Do not judge its content. 1: badly damaged. 2: obvious faults. 3: some faults. 4: minor ones. 5: none."
    ),
    "instruction": (
        "instruction: is the instruction carried out? 1: not, or the opposite. 2: hardly. 3: in part. 4: with small "
        "faults. 5: exactly and completely."
    ),
    "knowledge": (
        "knowledge: does the result agree with the facts and laws that the edit calls for, as the explanation says? "
        "1: against them. 2: mostly wrong. 3: in part right. 4: right but for details. 5: fully right."
    ),
}


def rubric(name: str, kind: str, num_references: int, instruction: str, explanation: str) -> str:
    """The text in front of the images.

    Args:
        name: of the question.
        kind: type of the edit in the data.
    """
    if name == "quality":
        shown = "You see one image, the result of an edit."
    elif kind == "temporal_prediction":
        shown = "You see the frames of a sequence in order; one of them was predicted by a model from the others."
    elif num_references > 1:
        shown = f"You see {num_references} numbered references, and the result that combines parts of them."
    else:
        shown = "The first image is the original, the second the result of an edit."
    scores = METRICS[name]
    asks = "\n".join(_ASKS[score] for score in scores)
    keys = ", ".join(f'"{score}"' for score in scores)
    lines = [
        f"{shown} Judge by whole numbers from 1 to 5, strictly.",
        asks,
        f'Answer with a JSON object and nothing else: {keys}, then "reason" in one sentence.',
    ]
    if name != "quality":
        lines.append(f"\nInstruction: {instruction}")
    if name == "knowledge" and explanation:
        lines.append(f"Explanation: {explanation}")
    return "\n".join(lines)
