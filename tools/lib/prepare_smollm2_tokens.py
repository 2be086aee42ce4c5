"""Text to kvfold-tokens-1 files and back."""

import json
import pathlib

import tokenizers

from prepare_smollm2_env import ToolError, say, write_atomically

FORMAT = "kvfold-tokens-1"


def load_tokenizer(model_dir):
    path = pathlib.Path(model_dir) / "tokenizer.json"
    if not path.is_file():
        raise ToolError(f"no tokenizer in {model_dir}; run: prepare_smollm2 model")
    return tokenizers.Tokenizer.from_file(str(path))


def tokenize_file(text_path, out_path, model_dir):
    """Writes the ids of a UTF-8 text, without any start token; the ids decode to exactly that text."""
    tokenizer = load_tokenizer(model_dir)
    try:
        text = text_path.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise ToolError(f"{text_path} is not UTF-8: {error}") from None
    say(f"Tokenising {text_path.name} ({len(text)} characters)")
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    check_round_trip(text, tokenizer.decode(ids, skip_special_tokens=False), text_path)
    write_atomically(out_path, json.dumps({
        "format": FORMAT,
        "tokenizer": "smollm2",
        "vocab_size": tokenizer.get_vocab_size(),
        "source": text_path.name,
        "ids": ids,
    }, separators=(",", ":")) + "\n")
    say(f"{len(ids)} tokens in {out_path}")


def check_round_trip(text, decoded, text_path):
    if decoded == text:
        return
    same = next((i for i, (a, b) in enumerate(zip(text, decoded)) if a != b), min(len(text), len(decoded)))
    line = text.count("\n", 0, same) + 1
    raise ToolError(f"{text_path}, line {line}: {text[same:same + 1]!r} cannot be expressed in this "
                    "vocabulary, so the tokens would not decode to the text")


def detokenize_file(tokens_path, model_dir):
    """Returns the text of a tokens file."""
    try:
        tokens = json.loads(tokens_path.read_text())
    except ValueError as error:
        raise ToolError(f"{tokens_path} is not JSON: {error}") from None
    if not isinstance(tokens, dict) or tokens.get("format") != FORMAT:
        raise ToolError(f"{tokens_path} is not a {FORMAT} file")
    tokenizer = load_tokenizer(model_dir)
    if tokens.get("vocab_size") != tokenizer.get_vocab_size():
        raise ToolError(f"{tokens_path} was made with another tokenizer")
    return tokenizer.decode(tokens.get("ids", []), skip_special_tokens=False)
