"""Text to kvfold-tokens-1 files and back; retrieval cases to kvfold-token-cases-1 files."""

import json
import pathlib
import re

import tokenizers

from prepare_smollm2_env import ToolError, say, write_atomically

FORMAT = "kvfold-tokens-1"
CASES_FORMAT, TOKEN_CASES_FORMAT = "kvfold-cases-1", "kvfold-token-cases-1"

# The model's chat template, with its default system message.
CHAT_BEGIN = ("<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
              "<|im_start|>user\n")
CHAT_ANSWER = "<|im_end|>\n<|im_start|>assistant\n"


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


def chat_of(case):
    """The three parts of a case as a chat: what is read first, the question, and what has to follow."""
    # "Question: what is ...? Answer: ..." and "Tell me ... . I say that ...": the second sentence begins the answer.
    asked, begun = re.fullmatch(r"(.*?[?.]) (.*)", case["question"], flags=re.DOTALL).groups()
    return CHAT_BEGIN + case["context"], "\n" + asked + CHAT_ANSWER + begun, case["answer"].rstrip(".")


def tokenize_cases(cases_path, out_path, model_dir):
    """Writes cases as chats in ids. The parts are tokenised one by one, so that each begins with a token of its own."""
    tokenizer = load_tokenizer(model_dir)
    try:
        cases = json.loads(cases_path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ToolError(f"{cases_path} is not JSON: {error}") from None
    if not isinstance(cases, dict) or cases.get("format") != CASES_FORMAT:
        raise ToolError(f"{cases_path} is not a {CASES_FORMAT} file; make one with kvfold-evaluate --write-cases")
    ids = lambda text: tokenizer.encode(text, add_special_tokens=False).ids
    made = []
    for case in cases["cases"]:
        context, question, answer = map(ids, chat_of(case))
        made.append({"task": case["task"], "depth": case["depth"], "length": case["length"],
                     "context": context, "question": question, "answer": answer})
    write_atomically(out_path, json.dumps({"format": TOKEN_CASES_FORMAT, "tokenizer": "smollm2", "cases": made},
                                          separators=(",", ":")) + "\n")
    say(f"{len(made)} cases in {out_path}")
