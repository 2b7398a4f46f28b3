"""The picture of a run's losses: drawn from whole and cut-off metrics, refused with a reason otherwise."""

import json

import pytest

from training.report import draw_losses, main, read_metrics

PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"


def write_run(folder, steps=50):
    folder.mkdir()
    lines = [{"step": i, "tokens": 100 * i, "loss": 8 / i} for i in range(1, steps + 1)]
    lines[2]["loss"] = None  # a step that was skipped because its loss was not finite
    lines.append({"step": steps, "tokens": 100 * steps, "validation_loss": 1.5, "bits_per_byte": 1.0})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def test_runs_are_drawn_side_by_side(tmp_path, capsys):
    first, second = write_run(tmp_path / "a"), write_run(tmp_path / "b", steps=10)
    main([str(first), str(second)])
    picture = first / "loss.png"
    assert capsys.readouterr().out.strip() == str(picture)
    assert picture.read_bytes().startswith(PNG_SIGNATURE)
    alone = draw_losses([first], tmp_path / "alone.png")
    assert alone.read_bytes() != picture.read_bytes()


def test_a_last_line_cut_short_is_left_out(tmp_path):
    run = write_run(tmp_path / "a")
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 51, "tok')
    assert len(read_metrics(run)) == 51


@pytest.mark.parametrize(
    "content, reason", [(None, "has no metrics.jsonl"), ("", "empty"), ("x\n{}\n", "line 1")]
)
def test_what_is_no_run_is_refused_with_its_reason(tmp_path, content, reason):
    if content is not None:
        (tmp_path / "metrics.jsonl").write_text(content)
    with pytest.raises(ValueError, match=reason):
        read_metrics(tmp_path)
    with pytest.raises(SystemExit, match=reason):
        main([str(tmp_path)])
