import subprocess
import sys

from vlm_jax.data.text import SentencePieceConfig, build_tokenizer
from vlm_jax.data.train_tokenizer import main


def test_command_writes_a_model_of_the_captions(tmp_path, capsys):
    table, output = tmp_path / "t.csv", tmp_path / "new" / "t.model"
    rows = [f"{n}.png,a drawing of walrus number {n}" for n in range(30)]
    table.write_text("image,caption\n" + "\n".join(rows))
    assert main([f"--path={table}", f"--output={output}", "--vocab_size=330"]) == 0
    tokenizer = build_tokenizer(SentencePieceConfig(path=str(output), length=16), None)
    assert tokenizer.vocab_size <= 330
    assert f"{output}: {tokenizer.vocab_size} ids" in capsys.readouterr().out
    ids = tokenizer.encode("a drawing of walrus number 7")
    assert len(ids) < 12  # words of the captions are pieces, not letters
    assert tokenizer.decode(ids) == "a drawing of walrus number 7"


def test_command_names_what_is_wrong(tmp_path, capsys):
    table = tmp_path / "t.csv"
    assert main([f"--path={table}", "--output=x"]) == 2
    table.write_text("image,caption\nx.png,\n")
    assert main([f"--path={table}", "--output=x"]) == 2
    errors = capsys.readouterr().err
    assert "t.csv' is not a file" in errors
    assert "no caption to train a tokenizer from" in errors


def test_module_runs_as_a_command():
    command = [sys.executable, "-m", "vlm_jax.data.train_tokenizer", "--help"]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "--vocab_size" in result.stdout
