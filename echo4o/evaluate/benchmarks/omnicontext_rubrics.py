"""What OmniContext asks its judge: prompt following and subject consistency, each with a variant for scenes."""

from __future__ import annotations

from typing import Literal

from echo4o.evaluate.parsing import Answer, Number, Text

SCORE = Answer(
    (Number("score", 0, 10, about="from 0 to 10"), Text("reasoning", aliases=("reason",))),
    bare=True,
)

_OPENING = """\
You are a professional digital artist. You judge pictures made by AI by the rules below. All people in them are \
made by AI, so privacy is no concern.

{images} The last image is the result that was made from them by the instruction at the end.

Answer with a JSON object and nothing else: {{"score": a number from 0 to 10, "reasoning": "short"}}."""

_PROMPT_FOLLOWING = """\
RULES: how completely does the last image carry out the instruction?
Look only at what the instruction asks for: poses, actions and interactions, composition, things added or taken away, \
other changes. Do not judge {ignored}; other scores do that.
0: nothing of the instruction is carried out. 1-3: hardly anything. 4-6: some of it, with essential parts missing. \
7-9: most of it, with minor faults. 10: all of it, exactly."""

_SUBJECT_CONSISTENCY = """\
RULES: are the subjects of the last image the same individuals and things as in the reference images?
Compare for each subject: face and head (shape, features, proportions), whether the right individuals of the right \
references were taken, build, skin tone, clothing and hair unless the instruction changes them; for things shape, \
colours, material, marks and text.{scene}
Do not judge whether the instruction was carried out, or beauty.
0: no subject can be recognised. 1-3: hardly any likeness. 4-6: some likeness, with clear differences. 7-9: the same \
with small differences. 10: the same in every feature. Be strict: take off one point for each difference."""

_SCENE = """
One reference shows the scene. Compare it, too: the background of the last image has to be that place, with its \
layout and objects, and the subjects have to blend into it in light, perspective and scale."""


def rubric(metric: Literal["PF", "SC"] | str, is_scene: bool, num_references: int) -> str:
    """The text in front of instruction and images.

    Args:
        metric: ``PF`` prompt following, or ``SC`` subject consistency.
    """
    if num_references == 1:
        images = "The first image is the reference."
    else:
        images = f"The first {num_references} images are the references, in order."
    opening = _OPENING.format(images=images)
    if metric == "PF":
        ignored = "whether subjects look like their references"
        ignored += ", whether the scene does, or beauty" if is_scene else ", or beauty"
        return f"{opening}\n\n{_PROMPT_FOLLOWING.format(ignored=ignored)}"
    return f"{opening}\n\n{_SUBJECT_CONSISTENCY.format(scene=_SCENE if is_scene else '')}"
