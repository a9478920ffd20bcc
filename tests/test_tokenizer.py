"""Tokenizer files of every form, made here; streaming and stop strings against the slow obvious way."""

import base64
import io
import json
import random
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import tokenizers
import transformers
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers.convert_slow_tokenizer import bytes_to_unicode

from errors import UserError
from tokenizer import TextStream, Tokenizer, eos_ids, load, special_tokens

FAMILY = "\U0001f468\u200d\U0001f469\u200d\U0001f467\u200d\U0001f466"  # four emoji joined by ZWJ into one
TEXTS = [
    "Hello, world! The quick brown fox's tail isn't 12345 long.",
    "Zażółć gęślą jaźń, naïve café, Straße",
    "Привет, мир! Γειά σου κόσμε",
    "你好,世界。日本語のテキスト、한국어 텍스트",
    "مرحبا بالعالم שלום עולם नमस्ते दुनिया สวัสดี",
    f"emoji \U0001f600 {FAMILY} \U0001f44d\U0001f3fd \U0001f1eb\U0001f1f7!",
    "def f(x):\n    if x > 0:\n\t\treturn {'a': [1, 2]}  # ok\n\n\n",
    "  two  spaces,   three\t tabs\r\n and the end  ",
    " ",
    "",
    "\u2028 \x00 \x85 \xa0 \ufeff \ufffd \U0010ffff e\u0301",
]
BYTES = {letter: byte for byte, letter in bytes_to_unicode().items()}  # the letters of byte-level BPE
SPECIAL = ["<|endoftext|>", "</s>", "<s>", "<|begin_of_text|>", "<unk>"]


def corpus() -> list[str]:
    rng = random.Random(0)
    words = " ".join(TEXTS[:7]).split()
    return [" ".join(rng.choices(words, k=12)) for _ in range(300)]


def write(folder: Path, name: str, value: object) -> Path:
    (folder / name).write_text(value if isinstance(value, str) else json.dumps(value), encoding="utf-8")
    return folder


def train_bytes(*splits: pre_tokenizers.PreTokenizer, use_regex: bool = True) -> tokenizers.Tokenizer:
    backend = tokenizers.Tokenizer(models.BPE())
    letters = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=use_regex)
    backend.pre_tokenizer = pre_tokenizers.Sequence([*splits, letters])
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<|endoftext|>", "<s>", "</s>"]
    trainer = trainers.BpeTrainer(
        vocab_size=500, initial_alphabet=alphabet, special_tokens=special, show_progress=False
    )
    backend.train_from_iterator(corpus(), trainer)
    return backend


def train_pieces(**options: object) -> bytes:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(corpus()),
        model_writer=model,
        model_type="bpe",
        vocab_size=600,
        byte_fallback=True,
        character_coverage=0.98,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        num_threads=1,
        minloglevel=2,
        **options,
    )
    return model.getvalue()


def convert_pieces(folder: Path) -> tokenizers.Tokenizer:
    """The sentencepiece model as Llama 2's tokenizer.json has it: a merge for every way to make a piece of two."""
    model = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    vocab = {model.id_to_piece(i): i for i in range(model.vocab_size())}
    merges = [(p[:n], p[n:]) for p in vocab for n in range(1, len(p)) if p[:n] in vocab and p[n:] in vocab]
    merges.sort(key=lambda pair: -model.get_score(vocab["".join(pair)]))
    backend = tokenizers.Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    backend.add_special_tokens(["<unk>", "<s>", "</s>"])
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    steps = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    backend.decoder = decoders.Sequence(steps)
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", vocab["<s>"])])
    return backend


def tiktoken_lines() -> str:
    words = {f"{word[:n]}".encode() for text in TEXTS for word in text.split(" ") for n in range(2, len(word) + 1)}
    tokens = [bytes([n]) for n in range(256)] + sorted(words | {b" " + word for word in words}, key=len)
    tokens = list(dict.fromkeys(tokens))
    return "".join(f"{base64.b64encode(token).decode()} {n}\n" for n, token in enumerate(tokens))


TEKKEN_NAMES = ["<unk>", "<s>", "</s>", "[INST]", "[/INST]", "<pad>"]


def tekken(names: list[str] | None, special: int = 24) -> dict[str, Any]:
    """As Mistral publishes it: the vocabulary has more tokens than the model, and not all special ones have names."""
    backend = split_words(TEKKEN_WORDS)
    vocab = sorted(backend.get_vocab(), key=backend.token_to_id)[3:]  # without the special tokens
    tokens = [base64.b64encode(bytes(BYTES[letter] for letter in token)).decode() for token in vocab]
    config = {"pattern": TEKKEN_WORDS, "default_vocab_size": special + 480, "default_num_special_tokens": special}
    config |= {"num_vocab_tokens": len(vocab), "version": "v11"}
    made = {"config": config, "vocab": [{"rank": n, "token_bytes": token} for n, token in enumerate(tokens)]}
    listed = [{"rank": n, "token_str": name, "is_control": True} for n, name in enumerate(names or ())]
    return made if names is None else made | {"special_tokens": listed}


def save_vocab_merges(folder: Path, backend: tokenizers.Tokenizer, **config: object) -> Path:
    folder.mkdir(exist_ok=True)
    backend.model.save(str(folder))
    return write(folder, "tokenizer_config.json", config)


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One folder of every form; "pieces_json" is the sentencepiece model as transformers converts it."""
    root = tmp_path_factory.mktemp("tokenizers")
    made = {name: root / name for name in ("json", "merges", "qwen", "pieces", "pieces_json", "tekken", "tiktoken")}
    for folder in made.values():
        folder.mkdir()
    backend = train_bytes()
    save_vocab_merges(made["merges"], backend, tokenizer_class="GPT2Tokenizer", bos_token="</s>", add_bos_token=True)
    save_vocab_merges(made["qwen"], backend, tokenizer_class="Qwen2Tokenizer", eos_token="<|im_end|>")
    size = backend.get_vocab_size()
    write(made["qwen"], "added_tokens.json", {"<|im_end|>": size, "<think>": size + 1})
    bos = ("<|endoftext|>", backend.token_to_id("<|endoftext|>"))
    template = processors.TemplateProcessing(single="<|endoftext|> $A", special_tokens=[bos])
    backend.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=False), template])
    backend.enable_truncation(4)  # must not cut prompts
    backend.save(str(made["json"] / "tokenizer.json"))
    (made["pieces"] / "tokenizer.model").write_bytes(train_pieces())
    convert_pieces(made["pieces"]).save(str(made["pieces_json"] / "tokenizer.json"))
    write(made["tekken"], "tekken.json", tekken(TEKKEN_NAMES))
    write(made["tiktoken"], "tokenizer.model", tiktoken_lines())
    return made


@pytest.fixture(scope="session")
def loaded(folders: dict[str, Path]) -> dict[str, Tokenizer]:
    return {name: load(folder) for name, folder in folders.items()}


FORMS = ["json", "merges", "qwen", "pieces", "pieces_json", "tekken", "tiktoken"]


@pytest.fixture(params=FORMS)
def form(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def tokenizer(loaded: dict[str, Tokenizer], form: str) -> Tokenizer:
    return loaded[form]


def random_ids(tokenizer: Tokenizer, rng: random.Random, count: int) -> list[int]:
    """Ids of a random piece of text, of single bytes or of anything, mixed."""
    ids: list[int] = []
    while len(ids) < count:
        text = tokenizer.encode(rng.choice(TEXTS), special=False) or [0]
        start = rng.randrange(len(text))
        ids += text[start : start + rng.randrange(1, 8)]
        ids += [rng.randrange(tokenizer.vocab_size + 5) for _ in range(rng.randrange(4))]
        ids += [rng.randrange(300) for _ in range(rng.randrange(4))]  # where the bytes are, in each of the forms
    return ids


# ---- encode and decode ----


def test_round_trip(tokenizer: Tokenizer, form: str) -> None:
    for text in TEXTS:
        ids = tokenizer.encode(text)
        assert all(0 <= i < tokenizer.vocab_size for i in ids)
        expected = text if form != "qwen" else normalizers.NFC().normalize_str(text)
        assert tokenizer.decode(ids) == expected


def test_long_text_is_not_truncated(tokenizer: Tokenizer) -> None:
    assert tokenizer.decode(tokenizer.encode("The quick brown fox " * 500)) == "The quick brown fox " * 500


# transformers does not split the tiktoken form as Llama 3 does: that one has a test of its own below.
@pytest.mark.parametrize("form", FORMS[:-1], indirect=True)
def test_ids_equal_transformers(loaded: dict[str, Tokenizer], folders: dict[str, Path], form: str) -> None:
    if form in ("merges", "qwen"):
        kind = {"merges": transformers.GPT2Tokenizer, "qwen": transformers.Qwen2Tokenizer}[form]
        wanted = kind.from_pretrained(folders[form])
    elif form == "tekken":
        wanted = with_bos(transformers.TokenizersBackend.from_pretrained(folders[form]).backend_tokenizer)
        wanted = transformers.PreTrainedTokenizerFast(tokenizer_object=wanted)
    else:
        file = folders["json" if form == "json" else "pieces_json"] / "tokenizer.json"
        wanted = transformers.PreTrainedTokenizerFast(tokenizer_file=str(file))
    for text in TEXTS:
        assert loaded[form].encode(text) == wanted.encode(text), text
        ids = loaded[form].encode(text)
        assert loaded[form].decode(ids) == wanted.decode(ids, skip_special_tokens=True)


# ---- the form that each family is published in ----

WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
TEKKEN_WORDS = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# gpt-oss: as tekken, but with contractions at the end of a word and digits in threes.
O200K_WORDS = TEKKEN_WORDS.replace("|", "(?i:'s|'t|'re|'ve|'m|'ll|'d)?|", 2).replace(r"\p{N}| ", r"\p{N}{1,3}| ")


def split_words(words: str) -> tokenizers.Tokenizer:
    return train_bytes(pre_tokenizers.Split(tokenizers.Regex(words), "isolated"), use_regex=False)


def qwen_json() -> tokenizers.Tokenizer:
    backend = split_words(WORDS % "")
    backend.normalizer = normalizers.NFC()
    backend.add_tokens([AddedToken("<think>", normalized=False)])
    return backend


def distilled_json() -> tokenizers.Tokenizer:
    """DeepSeek's names of special tokens have sentencepiece's space in them, and its own BOS is before each text."""
    backend = split_words(WORDS % "")
    backend.normalizer = normalizers.NFC()
    backend.add_special_tokens(
        [AddedToken(f"<｜{name}｜>", normalized=False) for name in ("begin▁of▁sentence", "User")]
    )
    backend.add_tokens([AddedToken("<think>", normalized=False)])
    return with_bos(backend, "<｜begin▁of▁sentence｜>")


def neox_json() -> tokenizers.Tokenizer:
    backend = train_bytes()
    backend.normalizer = normalizers.NFC()
    backend.add_tokens([AddedToken(" " * n, normalized=True) for n in range(6, 1, -1)])
    return backend


def falcon_json() -> tokenizers.Tokenizer:
    backend = train_bytes()
    digits = [pre_tokenizers.Digits(), pre_tokenizers.Split(tokenizers.Regex("[0-9][0-9][0-9]"), "isolated")]
    steps = [pre_tokenizers.Punctuation("contiguous"), pre_tokenizers.ByteLevel(add_prefix_space=False), *digits]
    backend.pre_tokenizer = pre_tokenizers.Sequence(steps)
    return backend


def metaspace_json(folder: Path) -> tokenizers.Tokenizer:
    backend = convert_pieces(folder)
    backend.normalizer = None
    backend.pre_tokenizer = pre_tokenizers.Metaspace("\u2581", prepend_scheme="first", split=False)
    return backend


def phi3_json(folder: Path) -> tokenizers.Tokenizer:
    backend = convert_pieces(folder)
    backend.post_processor = processors.TemplateProcessing(single="$A")
    backend.add_special_tokens([AddedToken("<|end|>", rstrip=True, normalized=False)])
    return backend


def gemma_json(folder: Path) -> tokenizers.Tokenizer:
    """No space is put before a text; runs of spaces and of line breaks are pieces of the model and added tokens too."""
    data = json.loads(convert_pieces(folder).to_str())
    space, size = "\u2581", len(data["model"]["vocab"])
    data["model"]["vocab"] |= {2 * space: size, "\n": size + 1, "\n\n": size + 2}
    data["model"]["merges"] = [[space, space], ["\n", "\n"], *data["model"]["merges"]]
    backend = tokenizers.Tokenizer.from_str(json.dumps(data))
    backend.normalizer = normalizers.Replace(" ", space)
    backend.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    backend.decoder = decoders.Sequence([decoders.Replace(space, " "), decoders.ByteFallback(), decoders.Fuse()])
    backend.add_tokens([AddedToken(text, normalized=False) for text in ("\n\n", "\n", 2 * space)])
    return backend


def with_bos(backend: tokenizers.Tokenizer, name: str = "<s>") -> tokenizers.Tokenizer:
    bos = [(name, backend.token_to_id(name))]
    template = processors.TemplateProcessing(single=f"{name} $A", special_tokens=bos)
    backend.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=False), template])
    return backend


# How the tokenizer.json of each family is made, from the folder of a sentencepiece model, what it does to a text, and
# what AutoTokenizer goes by: tokenizer_class and model_type. (With model_type "llama" the first would differ: there
# transformers 5 has rules of its own instead of the file's, and they drop a space at the beginning of a text.)
# Meta's own files, and the vocab and merges of OPT and Qwen, are the forms "pieces", "tiktoken", "merges" and "qwen".
PUBLISHED = {
    "llama-2, mistral 0.1, mixtral": (convert_pieces, str, "LlamaTokenizer", "mistral"),
    "mistral 0.3": (metaspace_json, lambda text: text.removeprefix(" "), "LlamaTokenizer", "mistral"),
    "mistral nemo": (lambda _: with_bos(split_words(TEKKEN_WORDS)), str, "PreTrainedTokenizerFast", "mistral"),
    "llama-3": (lambda _: with_bos(split_words(WORDS % "{1,3}")), str, "PreTrainedTokenizerFast", "llama"),
    "smollm3": (lambda _: split_words(WORDS % "{1,3}"), str, "PreTrainedTokenizerFast", "smollm3"),
    "olmo2, phi-4": (lambda _: split_words(WORDS % "{1,3}"), str, "GPT2Tokenizer", "olmo2"),
    "smollm2, granite": (lambda _: train_bytes(pre_tokenizers.Digits(True)), str, "GPT2Tokenizer", "granite"),
    "qwen2, qwen3": (lambda _: qwen_json(), normalizers.NFC().normalize_str, "Qwen2Tokenizer", "qwen2"),
    "gpt_neox": (lambda _: neox_json(), normalizers.NFC().normalize_str, "GPTNeoXTokenizer", "gpt_neox"),
    "falcon": (lambda _: falcon_json(), str, "PreTrainedTokenizerFast", "falcon"),
    "phi-3": (phi3_json, str, "LlamaTokenizer", "phi3"),
    "gemma2, gemma3": (gemma_json, str, "GemmaTokenizer", "gemma2"),
    "gpt-oss": (lambda _: split_words(O200K_WORDS), str, "PreTrainedTokenizerFast", "gpt_oss"),
    "olmo3": (lambda _: split_words(WORDS % "{1,3}"), str, "GPT2Tokenizer", "olmo3"),
    "granite 4": (lambda _: split_words(WORDS % "{1,3}"), str, "GPT2Tokenizer", "granitemoehybrid"),
    "ministral 3": (lambda _: with_bos(split_words(TEKKEN_WORDS)), str, "TokenizersBackend", "mistral3"),
    "gemma3 with images": (gemma_json, str, "GemmaTokenizer", "gemma3"),
    "deepseek-r1 from qwen2": (
        lambda _: distilled_json(),
        normalizers.NFC().normalize_str,
        "LlamaTokenizerFast",
        "qwen2",
    ),
    "deepseek-r1 from llama": (
        lambda _: with_bos(split_words(WORDS % "{1,3}")),
        str,
        "LlamaTokenizerFast",
        "llama",
    ),
}
MORE_TEXTS = [
    "camelCase HTTPServer iPhone ǅungla ʰa ªº ÉCOLE É́cole DON'T don'T I'LL x'Re 'tis 's",
    "٣٤٥٦٧ १२३४ Ⅷ½² 0x1F 3.14159 1,234,567 12345678901",
    "a//b /// \r\n/\r\n //\n\n!!!\r\r?/\n \t /x\\/",
    "\u0301\u0301a\u0301 \u200d\u200b\ufe0f #\ufe0f\u20e3 \u3000\u3000x\xa0\xa0y \u180e",
    "<|start|>assistant<|channel|>final<|message|>[INST]x[/INST]<｜Assistant｜> <start_of_turn>",
    "a  b   c\n\nd\n\n\ne \n f      g",
    "\n\tif x:\n\t\t  pass",
    "<think>a 1234567 ABCdef's</think>",
]


@pytest.mark.parametrize("family", PUBLISHED)
def test_published_forms(folders: dict[str, Path], family: str, tmp_path: Path) -> None:
    """Ids and text equal AutoTokenizer's, the text comes back, and a stream of the ids gives it too."""
    build, kept, kind, model_type = PUBLISHED[family]
    build(folders["pieces"]).save(str(tmp_path / "tokenizer.json"))
    tokens = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    write(tmp_path, "tokenizer_config.json", {"tokenizer_class": kind} | tokens)
    write(tmp_path, "config.json", {"model_type": model_type})
    ours, theirs = load(tmp_path), transformers.AutoTokenizer.from_pretrained(tmp_path)
    for text in TEXTS + MORE_TEXTS:
        ids = ours.encode(text)
        assert ids == theirs.encode(text), text
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True) == kept(text)
        stream = TextStream(ours)
        assert "".join(map(stream.push, ids)) + stream.flush() == kept(text)
    assert (ours.prefix != ()) == any(name in family for name in ("llama", "mistral", "ministral", "gemma", "deepseek"))


def test_pieces_equal_sentencepiece(loaded: dict[str, Tokenizer], folders: dict[str, Path]) -> None:
    model = sentencepiece.SentencePieceProcessor(model_file=str(folders["pieces"] / "tokenizer.model"))
    for text in [*TEXTS, *SPECIAL]:
        ids = loaded["pieces"].encode(text)
        assert ids == [model.bos_id(), *model.encode(text)]
        assert loaded["pieces"].decode(ids) == model.decode(ids)


def test_tiktoken_splits_and_reserves_as_llama_3(loaded: dict[str, Tokenizer], folders: dict[str, Path]) -> None:
    tokenizer = loaded["tiktoken"]
    base = len((folders["tiktoken"] / "tokenizer.model").read_text().splitlines())
    assert tokenizer.vocab_size == base + 256
    assert tokenizer.encode("") == [base]
    names = ["begin_of_text", "end_of_text", "reserved_special_token_0", "start_header_id", "eot_id"]
    ids = [tokenizer.encode(f"<|{name}|>", special=False, parse_special=True) for name in names]
    assert ids == [[base], [base + 1], [base + 2], [base + 6], [base + 9]]
    last = tokenizer.encode("<|reserved_special_token_250|>", special=False, parse_special=True)
    assert last == [base + 255]
    pieces = [tokenizer.token_bytes(i) for i in tokenizer.encode("12345", special=False)]
    assert not any(b"34" in piece for piece in pieces)  # digits go in threes, though "12345" is a token


def test_tekken_without_a_list_of_special_tokens(tmp_path: Path) -> None:
    """Those of Mistral's first files, and names for the others; a template gets them too."""
    with pytest.raises(ValueError, match="special tokens"):  # fewer than have names
        load(write(tmp_path, "tekken.json", tekken(None, 8)))
    tokenizer = load(write(tmp_path, "tekken.json", tekken(None)))
    names = ["<s>", "[INST]", "[TOOL_CALLS]", "[SYSTEM_PROMPT]", "[TOOL_CONTENT]", "<SPECIAL_20>", "<SPECIAL_23>"]
    assert tokenizer.encode("".join(names), parse_special=True) == [1, 1, 3, 9, 17, 19, 20, 23]
    assert (tokenizer.bos, tokenizer.eos, tokenizer.vocab_size, len(tokenizer.special_ids)) == (1, 2, 504, 24)
    assert special_tokens(tmp_path) == dict(bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="<pad>")


def test_special_names_in_text_are_text(tokenizer: Tokenizer) -> None:
    for name in SPECIAL:
        for text in (name, f"a{name}b"):
            ids = tokenizer.encode(text, special=False)
            assert len(ids) > 2 and tokenizer.decode(ids) == text


def test_lone_surrogate_is_refused(tokenizer: Tokenizer) -> None:
    with pytest.raises(UserError, match=r"^'.ud800' at 1 is half a character"):
        tokenizer.encode("a\ud800")


def test_parse_special(loaded: dict[str, Tokenizer], form: str) -> None:
    name = {"tiktoken": "<|eot_id|>", "qwen": "<|im_end|>"}.get(form, "</s>")
    tokenizer = loaded[form]
    ids = tokenizer.encode(f"hello{name}{name}{name}", special=False, parse_special=True)
    assert len(set(ids[-3:])) == 1 and tokenizer.token_bytes(ids[-1]) == b""
    assert tokenizer.decode(ids) == "hello"
    assert tokenizer.encode(name, special=False, parse_special=True) == ids[-1:]
    assert ids[-1] not in tokenizer.encode(f"hello{name}", special=False)  # and the choice does not stick


def test_special_at_the_ends(loaded: dict[str, Tokenizer], form: str) -> None:
    tokenizer = loaded[form]
    name = {"json": "<|endoftext|>", "merges": "</s>", "tiktoken": "<|begin_of_text|>"}.get(form, "<s>")
    bos = [] if form == "qwen" else tokenizer.encode(name, special=False, parse_special=True)
    assert len(bos) == (form != "qwen")
    plain = tokenizer.encode("hello", special=False)
    assert tokenizer.encode("hello") == bos + plain and bos != plain[:1]


def test_settings_decide_on_bos_and_eos(folders: dict[str, Path], form: str, tmp_path: Path) -> None:
    """Except beside a tokenizer.json, which says itself what it adds."""
    for file in folders[form].iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    names = {"tiktoken": ("<|begin_of_text|>", "<|end_of_text|>")}.get(form, ("<s>", "</s>"))
    tokens = {"bos_token": names[0], "eos_token": {"content": names[1]}}
    write(tmp_path, "special_tokens_map.json", tokens)
    write(tmp_path, "tokenizer_config.json", {"add_bos_token": False, "bos_token": None})
    plain, ours = load(tmp_path).encode("hello", special=False), load(tmp_path).encode("hello")
    assert ours == (load(folders[form]).encode("hello") if "json" in form else plain)
    write(tmp_path, "tokenizer_config.json", {"add_bos_token": False, "add_eos_token": True})
    tokenizer = load(tmp_path)
    eos = tokenizer.encode(names[1], special=False, parse_special=True)
    assert len(eos) == 1 and tokenizer.eos == eos[0]
    assert tokenizer.encode("hello") == (ours if "json" in form else plain + eos)
    assert tokenizer.bos == tokenizer.encode(names[0], special=False, parse_special=True)[0]


def test_added_tokens_of_qwen_form(loaded: dict[str, Tokenizer]) -> None:
    tokenizer = loaded["qwen"]
    size = tokenizer.vocab_size
    assert tokenizer.encode("a<think>")[-1] == size - 1  # listed, but not special: always parsed, and printed
    assert tokenizer.decode([size - 1, size - 2]) == "<think>"
    assert tokenizer.decode([size, size + 100]) == ""  # ids of a padded embedding


def test_added_tokens_of_sentencepiece_form(folders: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes((folders["pieces"] / "tokenizer.model").read_bytes())
    decoder = {"600": {"content": "<|user|>", "special": True}, "601": {"content": "<tool>", "special": False}}
    write(tmp_path, "tokenizer_config.json", {"added_tokens_decoder": decoder})
    tokenizer = load(tmp_path)
    assert tokenizer.vocab_size == 602
    ids = tokenizer.encode("<|user|>hello<tool>", special=False, parse_special=True)
    assert (ids[0], ids[-1]) == (600, 601) and tokenizer.decode(ids) == "hello<tool>"
    assert {600, 601} & set(tokenizer.encode("<|user|>hello<tool>")) == {601}  # what is not special is always parsed
    write(tmp_path, "tokenizer_config.json", {"eos_token": "<|end|>", "extra_special_tokens": ["<0x41>", "<more>"]})
    tokenizer = load(tmp_path)  # tokens that are only named: pieces of the model, or new ones after all others
    byte = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model")).piece_to_id("<0x41>")
    assert tokenizer.encode("<more><|end|><0x41>", special=False, parse_special=True) == [601, 600, byte]
    assert tokenizer.eos == 600 and tokenizer.vocab_size == 602


def test_flags_of_added_tokens_of_sentencepiece_form(folders: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes((folders["pieces"] / "tokenizer.model").read_bytes())
    flags = {"600": {"lstrip": True}, "601": {"rstrip": True}, "602": {"single_word": True}, "603": {}}
    decoder = {i: {"content": f"<{i}>", "special": False} | flag for i, flag in flags.items()}
    decoder["602"]["content"] = "word"
    tokenizer = load(write(tmp_path, "tokenizer_config.json", {"added_tokens_decoder": decoder}))
    model = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model"))
    ids = tokenizer.encode("a <600> b <601> c word words <603> d", special=False)
    parts = [model.encode(part) for part in ("a", " b ", "c ", " words ", " d")]
    assert ids == [*parts[0], 600, *parts[1], 601, *parts[2], 602, *parts[3], 603, *parts[4]]


def test_metaspace_and_wordpiece_decoders(tmp_path: Path) -> None:
    backend = tokenizers.Tokenizer(models.BPE({"\u2581": 0, "a": 1, "\u2581a": 2}, [("\u2581", "a")]))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    backend.save(str(tmp_path / "tokenizer.json"))
    assert load(tmp_path).decode(load(tmp_path).encode("a a aa")) == "a a aa"
    backend.decoder = decoders.WordPiece()
    backend.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(ValueError, match="neither byte-level nor sentencepiece-like"):
        load(tmp_path)


# ---- streaming ----


def test_stream_equals_decode(tokenizer: Tokenizer) -> None:
    rng = random.Random(1)
    broken = 0
    for ids in [*map(tokenizer.encode, TEXTS), *(random_ids(tokenizer, rng, 30) for _ in range(100))]:
        stream = TextStream(tokenizer)
        parts = [stream.push(i) for i in ids] + [stream.flush()]
        assert "".join(parts) == tokenizer.decode(ids)
        assert stream.flush() == "" and not stream.stopped
        broken += "\ufffd" in parts[-1]
    assert broken  # some random sequences end within a character


def test_stream_never_prints_half_a_character(tokenizer: Tokenizer) -> None:
    text = "".join(TEXTS[:8]) * 2
    assert "\ufffd" not in text
    stream = TextStream(tokenizer)
    parts = [stream.push(i) for i in tokenizer.encode(text)]
    assert "\ufffd" not in "".join(parts) and stream.flush() == ""
    byte = {tokenizer.token_bytes(i): i for i in range(tokenizer.vocab_size)}
    ids = [byte[bytes([n])] for n in "é你\U0001f600".encode()]
    stream = TextStream(tokenizer)
    assert [stream.push(i) for i in ids] == ["", "é", "", "", "你", "", "", "", "\U0001f600"]
    assert [stream.push(i) for i in ids[2:4]] == ["", ""] and stream.flush() == "\ufffd"


def test_stream_prints_at_once(loaded: dict[str, Tokenizer]) -> None:
    """What is invalid already, not just incomplete, is not held back."""
    tokenizer = loaded["tiktoken"]
    stream = TextStream(tokenizer)
    assert [stream.push(i) for i in (0xFF, 0xE4, 0xE4, 0x41)] == ["\ufffd", "", "\ufffd", "\ufffdA"]


def test_stream_that_continues_keeps_the_space(loaded: dict[str, Tokenizer], form: str) -> None:
    tokenizer = loaded[form]
    text = "The quick brown"
    ids = tokenizer.encode(text)
    for n in range(1, len(ids) + 1):
        stream = TextStream(tokenizer, continues=n > 1 and tokenizer.decode(ids[:n]) != "")
        assert tokenizer.decode(ids[:n]) + "".join(map(stream.push, ids[n:])) == text


# ---- stop strings ----


def naive(text: str, stops: list[str]) -> tuple[str, bool]:
    """Cut `text` where the shortest beginning of it that holds a stop string has one."""
    for end in range(len(text) + 1):
        starts = [end - len(stop) for stop in stops if text[:end].endswith(stop)]
        if starts:
            return text[: min(starts)], True
    return text, False


def test_stops_equal_naive_search(tokenizer: Tokenizer) -> None:
    rng = random.Random(2)
    hits = 0
    for trial in range(300):
        if trial % 2:  # few letters: stop strings that overlap with themselves and with one another
            ids = tokenizer.encode("".join(rng.choices("ab \u4f60", k=40)))
            stops = ["".join(rng.choices("ab \u4f60", k=rng.randrange(1, 7))) for _ in range(rng.randrange(1, 4))]
        else:
            ids = random_ids(tokenizer, rng, 30)
            text = tokenizer.decode(ids)
            starts = [rng.randrange(len(text)) for _ in range(rng.randrange(4))]
            stops = [text[start : start + rng.randrange(1, 9)] for start in starts]
        wanted, stopped = naive(tokenizer.decode(ids), stops)
        stream = TextStream(tokenizer, stops)
        text = ""
        for i in ids:
            text += stream.push(i)
            assert wanted.startswith(text)
        assert text + stream.flush() == wanted == stream.text and stream.stopped == stopped
        hits += stopped
    assert 100 < hits < 300


def test_stop_over_several_tokens_and_within_one(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("The quick brown fox's tail")
    for stop in ("uick bro", "T", "x's", "ail", "The quick brown fox's tail"):
        stream = TextStream(tokenizer, [stop, "absent"])
        text, seen = "", 0
        while not stream.stopped:
            text += stream.push(ids[seen])
            seen += 1
        assert text == "The quick brown fox's tail".split(stop)[0]
        assert stop in tokenizer.decode(ids[:seen]) and stop not in tokenizer.decode(ids[: seen - 1])  # at once
        assert stream.push(ids[0]) == "" and stream.flush() == ""


def test_beginning_of_a_stop_is_held_back_and_flushed(loaded: dict[str, Tokenizer]) -> None:
    stream = TextStream(loaded["tiktoken"], ["abcd"])
    assert [stream.push(ord(c)) for c in "xabcabc"] == ["x", "", "", "", "abc", "", ""]
    assert stream.flush() == "abc" and not stream.stopped


@pytest.mark.parametrize("stops", [[""], ["a", ""], "abc"])
def test_bad_stops(loaded: dict[str, Tokenizer], stops: list[str]) -> None:
    with pytest.raises(ValueError, match="must be a list of non-empty strings"):
        TextStream(loaded["json"], stops)


def naive_special(parts: list[tuple[str, bool]], stops: list[str]) -> tuple[str, bool]:
    """As `naive`, over (character or name of a special token, whether it is special): no such name is shown."""
    for end in range(len(parts) + 1):
        starts = []
        for start in range(end):
            full = "".join(text for text, _ in parts[start:end])
            shown = "".join(text for text, special in parts[start:end] if not special)
            ends = not parts[end - 1][1] and not parts[start][1]
            if any(full == stop or shown == stop and ends for stop in stops):
                starts.append(start)
        if starts:
            return "".join(text for text, special in parts[: min(starts)] if not special), True
    return "".join(text for text, special in parts if not special), False


def test_stops_that_hold_special_tokens(tokenizer: Tokenizer) -> None:
    """Alone, within text and several of them; other special tokens do not hide a stop string that has none."""
    rng, hits = random.Random(4), 0
    special = rng.sample(sorted(tokenizer.special_ids), min(3, len(tokenizer.special_ids)))
    letters = {c: tokenizer.encode(f"x{c}", special=False)[-1] for c in "ab"}
    letters = {c: i for c, i in letters.items() if tokenizer.token_bytes(i) == c.encode()}
    for _ in range(300):
        parts = [(rng.choice([*letters, *special]), False) for _ in range(12)]
        parts = [(text, text in special) for text, _ in parts]
        stops = ["".join(rng.choices([*letters, *special], k=rng.randrange(1, 5))) for _ in range(rng.randrange(1, 4))]
        wanted, stopped = naive_special(parts, stops)
        stream, text = TextStream(tokenizer, stops, continues=True), ""
        for part, is_special in parts:
            text += stream.push(tokenizer.special_ids[part] if is_special else letters[part])
            assert wanted.startswith(text)
        assert (text + stream.flush(), stream.stopped) == (wanted, stopped), (parts, stops)
        hits += stopped
    assert len(letters) == 2 and 100 < hits < 300


# ---- eos ids ----


@pytest.mark.parametrize(
    ("generation", "config", "wanted"),
    [
        (None, None, set()),
        (None, {"eos_token_id": 2}, {2}),
        (None, {"eos_token_id": None}, set()),
        (None, {"text_config": {"eos_token_id": [1, 106]}}, {1, 106}),
        (None, {"text_config": {"eos_token_id": 1}, "eos_token_id": 5}, {5}),
        (None, {"text_config": 7}, set()),
        ({"eos_token_id": [200002, 199999, 200012]}, {"eos_token_id": 200002}, {200002, 199999, 200012}),
        ({"eos_token_id": [1, 5]}, {"eos_token_id": 2}, {1, 5}),
        ({"eos_token_id": 0}, {"eos_token_id": 2}, {0}),
        ({"eos_token_id": None}, {"eos_token_id": [2, 3]}, {2, 3}),
        ({}, {}, set()),
    ],
)
def test_eos_ids(tmp_path: Path, generation: dict | None, config: dict | None, wanted: set[int]) -> None:
    for name, value in (("generation_config.json", generation), ("config.json", config)):
        if value is not None:
            write(tmp_path, name, value)
    assert eos_ids(tmp_path) == wanted


def test_eos_of_the_tokenizer(folders: dict[str, Path], tmp_path: Path) -> None:
    """In a chat it is one more; otherwise it counts where the configs name none."""
    for file in folders["qwen"].iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    tokenizer = load(tmp_path)
    assert tokenizer.eos == 500
    assert eos_ids(tmp_path, tokenizer) == eos_ids(tmp_path, tokenizer, chat=True) == {500}
    write(tmp_path, "config.json", {"eos_token_id": 7})
    assert eos_ids(tmp_path, tokenizer) == {7} and eos_ids(tmp_path, tokenizer, chat=True) == {7, 500}
    write(tmp_path, "generation_config.json", {"eos_token_id": [8, 9]})
    assert eos_ids(tmp_path, tokenizer) == {8, 9} and eos_ids(tmp_path, tokenizer, chat=True) == {8, 9, 500}
    assert eos_ids(tmp_path, None, chat=True) == {8, 9}


@pytest.mark.parametrize("content", ["{", "[1]", '{"eos_token_id": "2"}', '{"eos_token_id": [true]}'])
def test_broken_eos_ids(tmp_path: Path, content: str) -> None:
    one_line_error(lambda: eos_ids(write(tmp_path, "config.json", content)), "config.json")


# ---- broken files ----


def one_line_error(call: object, *words: str) -> None:
    with pytest.raises(ValueError) as caught:
        call()
    message = str(caught.value)
    assert message.isprintable() and len(message) < 300 and all(word in message for word in words), message


def test_no_files(tmp_path: Path) -> None:
    assert load(tmp_path) is None


def changed(**config: Any) -> dict[str, Any]:
    """A tekken.json of single bytes."""
    right = {"pattern": ".", "default_vocab_size": 259, "default_num_special_tokens": 3}
    vocab = [{"rank": n, "token_bytes": base64.b64encode(bytes([n])).decode()} for n in range(256)]
    listed = [{"rank": n, "token_str": name} for n, name in enumerate(TEKKEN_NAMES[:3])]
    return {"config": right | config, "vocab": vocab, "special_tokens": listed}


BAD_TEKKEN = [changed(**{name: bad}) for name in changed()["config"] for bad in (None, "3", 10**12, -1, [1])]
BAD_TEKKEN = [json.dumps(bad) for bad in BAD_TEKKEN if bad["config"]["pattern"] != "3"]
BAD_TEKKEN += [
    json.dumps(changed() | {name: bad}) for name in ("config", "vocab", "special_tokens") for bad in (5, [5])
]
BAD_TEKKEN += [json.dumps(changed() | {"special_tokens": [{"rank": 0, "token_str": name}]}) for name in (5, [5])]
BAD_TEKKEN += [json.dumps(changed() | {"vocab": changed()["vocab"][::-1]})]
BAD_TEKKEN += [json.dumps(changed() | {"vocab": 256 * [{"rank": 0, "token_bytes": bad}]}) for bad in ("?", "YQ==", 5)]


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ({"tokenizer.json": ""}, ["tokenizer.json", "not JSON"]),
        ({"tokenizer.json": '{"model": {"type": "Odd"}}'}, ["tokenizer.json"]),
        ({"vocab.json": "{", "merges.txt": ""}, ["vocab.json", "line 1"]),
        ({"vocab.json": '{"a": "b"}', "merges.txt": ""}, ["vocab.json", "integers"]),
        ({"vocab.json": '{"a": 0}'}, ["vocab.json", "merges.txt is missing"]),
        ({"merges.txt": ""}, ["merges.txt", "vocab.json is missing"]),
        ({"vocab.json": '{"a": 0}', "merges.txt": "a a a"}, ["merges.txt", "two tokens"]),
        ({"vocab.json": '{"a": 0}', "merges.txt": "a b"}, ["merges.txt", "out of vocabulary"]),
        ({"vocab.json": '{"a": 0}', "merges.txt": "", "added_tokens.json": '{"x": 7}'}, ["'x' must have id 7"]),
        ({"vocab.json": '{"a": 0}', "merges.txt": "", "added_tokens.json": '{"x": "y"}'}, ["added tokens"]),
        ({"vocab.json": '{"a": 0}', "merges.txt": "", "tokenizer_config.json": "}"}, ["tokenizer_config.json"]),
        ({"tekken.json": "{"}, ["tekken.json", "not JSON"]),
        *(({"tekken.json": bad}, ["tekken.json", "not a vocabulary"]) for bad in BAD_TEKKEN),
        ({"tekken.json": json.dumps(changed(pattern="("))}, ["tekken.json"]),
        ({"tokenizer.model": ""}, ["tokenizer.model", "neither"]),
        ({"tokenizer.model": "not a model\n"}, ["tokenizer.model", "neither"]),
        ({"tokenizer.model": "YQ== 0\n?\n"}, ["tokenizer.model", "line 2"]),
        ({"tokenizer.model": "YQ== 0\nYg== x\n"}, ["tokenizer.model", "line 2"]),
        ({"tokenizer.model": "YQ== 0\nYg== 2\n"}, ["tokenizer.model", "ranks"]),
        ({"tokenizer.model": "YQ== 0\nYg== 1\n"}, ["tokenizer.model", "256 single bytes"]),
    ],
)
def test_broken_files(tmp_path: Path, files: dict[str, str], words: list[str]) -> None:
    folder = tmp_path / "odd\x1b[2J\nname"
    folder.mkdir()
    for name, content in files.items():
        write(folder, name, content)
    one_line_error(lambda: load(folder), *words)


def test_unreadable_text(tmp_path: Path, folders: dict[str, Path]) -> None:
    (tmp_path / "tokenizer.json").write_bytes((folders["json"] / "tokenizer.json").read_bytes())
    (tmp_path / "tokenizer_config.json").write_bytes(b'{"a": "\xff"}')
    one_line_error(lambda: load(tmp_path), "tokenizer_config.json", "UTF-8")


@pytest.mark.parametrize(
    "settings",
    [
        {"eos_token": 5},
        {"bos_token": {"content": None}},
        {"pad_token": {"content": "x", "lstrip": "yes"}},
        {"image_token": {"special": True}},
        {"extra_special_tokens": "abc"},
        {"extra_special_tokens": [5]},
        {"extra_special_tokens": {"x_token": 5}},
        {"additional_special_tokens": 5},
        {"model_specific_special_tokens": [5]},
        {"added_tokens_decoder": []},
        {"added_tokens_decoder": {"x": {"content": "y"}}},
        {"added_tokens_decoder": {"1": "y"}},
        {"added_tokens_decoder": {"1": {"content": "y", "special": 1}}},
    ],
)
def test_broken_settings(folders: dict[str, Path], form: str, settings: dict, tmp_path: Path) -> None:
    for file in folders[form].iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    kind = {"merges": "GPT2Tokenizer", "qwen": "Qwen2Tokenizer"}.get(form)
    write(tmp_path, "tokenizer_config.json", settings | {"tokenizer_class": kind})
    if form not in ("tekken", "tiktoken") or not any("special_tokens" in key or "added" in key for key in settings):
        one_line_error(lambda: load(tmp_path), "token")
