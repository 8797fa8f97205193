"""Small `tokenizer.json` files of each kind that Hugging Face writes, trained from a few captions."""

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

CAPTIONS = [
    f"a photo of a {size} {color} {thing}, s{number}"
    for number, size in enumerate(("big", "tiny"))
    for color in ("red", "teal")
    for thing in ("cat", "dog", "</s> sign")
]


def byte_bpe() -> Tokenizer:
    """As CLIP's, GPT-2's and Llama 3's, with a template and a limit of its own, which must not matter."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=["<pad>", "<s>", "</s>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator(CAPTIONS, trainer)
    tokenizer.add_special_tokens(["<mask>"])
    tokenizer.add_tokens([AddedToken("<br>", special=False)])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    tokenizer.enable_truncation(5)
    tokenizer.enable_padding(length=9)
    return tokenizer


def word_piece() -> Tokenizer:
    """As BERT's; words are split at white space alone, so that a text's "[SEP]" is a word of the vocabulary."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=False)
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.decoder = decoders.WordPiece()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    tokenizer.train_from_iterator(CAPTIONS, trainers.WordPieceTrainer(vocab_size=150, special_tokens=special))
    return tokenizer


def unigram() -> Tokenizer:
    """As T5's and Gemma's relatives: special tokens are pieces like all others."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    special = ["<pad>", "</s>", "<unk>", "<bos>"]
    alphabet = list("abcdefghijklmnopqrstuvwxyz<>/[]_,.'0123456789")
    trainer = trainers.UnigramTrainer(
        vocab_size=110, special_tokens=special, unk_token="<unk>", initial_alphabet=alphabet
    )
    tokenizer.train_from_iterator(CAPTIONS, trainer)
    return tokenizer


MODELS = {"byte_bpe": byte_bpe, "word_piece": word_piece, "unigram": unigram}
TEXTS = [
    "a photo of a tiny teal cat",
    "Big, RED dogs!",
    "",
    "  two  spaces ",
    "naïve café 東京 🐕",
    "a\nnew line",
    "x" * 40,
]
NASTY = ["</s>", "a </s> b", "<s>x<pad>", "[SEP]", "cat [SEP] dog [CLS] [PAD]", "<unk><bos> <mask>", "[MASK]"]
