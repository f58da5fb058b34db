"""Tasks of one's own."""

import json


def write_task(
    folder, *rows, name="mine", kind="multiple_choice", text='"{{q}}"', target="0", choices="[a, b]", more=""
):
    """Write a task's file and its documents into a folder; returns the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / f"{name}.yaml").write_text(
        f"task: {name}\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: {folder}/{name}.jsonl}}}}\n"
        f"test_split: test\noutput_type: {kind}\ndoc_to_text: {text}\ndoc_to_target: {target}\n"
        + f"doc_to_choice: {choices}\n" * (kind == "multiple_choice")
        + f"{more}\n"
    )
    return folder
