"""What to do about each reason for which a row cannot be used."""

from __future__ import annotations

from collections.abc import Mapping

REMEDIES: Mapping[str, str] = {
    "archive broken": "download the archive again; what is in front of the break is usable",
    "column missing": "name the data set's own columns: columns: {instruction: …, input_images: …, output_image: …}",
    "conversation missing": "rows of vlm_sft need conversations, a list of {from, value}",
    "duplicate key": "give every sample of the archive a name of its own",
    "grid too large": "lower max_image_size of the group's transform, or export the model with a larger position table",
    "image empty": "the file has no bytes: copy it again",
    "image missing": "copy the image to where the row says, or say where the images are (images: FOLDER, data_dir)",
    "image name ambiguous": "two files end like this: write more of the path into the row",
    "image too large": "scale the image down, or raise image_pixel_limit of the group if it is no bomb",
    "image truncated": "copy or download the image again",
    "image unreadable": "it is no image, or of a kind that Pillow does not know: encode it as PNG or JPEG",
    "instruction missing": "add an instruction (a text, or a list of paraphrases)",
    "instruction names a removed reference": "raise max_refs, or remove the row",
    "invalid json": "correct the line; one JSON object a line, no trailing comma",
    "jsonl unreadable": "see the message; copy the file again",
    "no images": "name the target output_image, the references input_images; or list them in image_list, target last",
    "no loss": "a conversation needs an answer (from: gpt)",
    "no references": "add input_images, or set allow_no_references: true to train such rows as text to image",
    "parquet unreadable": "copy or write the file again",
    "placeholder without image": "the text names more images than the row has: correct the numbers",
    "text not UTF-8": "save the file as UTF-8",
    "too few images": "an edit needs a source and a result",
    "too many references": "raise max_refs, or set max_refs_policy: truncate",
    "video missing": "copy the video to where the row says",
    "video unreadable": "pip install 'echo4o[video]', or encode the video as H.264 in MP4",
    "video truncated": "copy or download the video again",
    "wrong column type": "see the message: images are bytes or paths, instructions texts or lists of texts",
}
_UNKNOWN = "see the message; correct or remove these rows"


def remedy_for(reason: str) -> str:
    """What to do about a `RowError.reason`."""
    return REMEDIES.get(reason, _UNKNOWN)
