import json
import os
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ.setdefault("TQDM_MININTERVAL", "10")
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")     # read when attention.py is imported


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def published(tmp_path_factory):
    """Folders of a tiny CLIP (with and without projection) and T5, with tokenizers of the published kinds."""
    transformers = pytest.importorskip("transformers")
    tokenizers = pytest.importorskip("tokenizers")
    torch.manual_seed(0)
    root, words = tmp_path_factory.mktemp("encoders"), ["a", "red", "circle", "blue", "square"]
    # CLIP: byte pairs, begin and end marks
    folder = root / "clip"
    folder.mkdir()
    letters = "abcdefghijklmnopqrstuvwxyz"
    tokens = ["<|startoftext|>", "<|endoftext|>", *letters, *(f"{letter}</w>" for letter in letters)]
    vocab = {token: i for i, token in enumerate(tokens)}
    (folder / "vocab.json").write_text(json.dumps(vocab))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    transformers.CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"),
                               model_max_length=24).save_pretrained(folder)
    config = transformers.CLIPTextConfig(vocab_size=len(vocab), hidden_size=16, intermediate_size=32,
                                         num_hidden_layers=3, num_attention_heads=2, projection_dim=12,
                                         max_position_embeddings=24, bos_token_id=0, eos_token_id=1,
                                         pad_token_id=1)
    transformers.CLIPTextModelWithProjection(config).save_pretrained(folder)
    transformers.CLIPTextModel(config).save_pretrained(root / "sd1/text_encoder")
    transformers.CLIPTokenizer.from_pretrained(folder).save_pretrained(root / "sd1/tokenizer")
    # T5: here whole words, and an end mark
    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel(
        {word: i for i, word in enumerate(["<pad>", "</s>", "<unk>", *words])}, "<unk>"))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    inner.post_processor = tokenizers.processors.TemplateProcessing("$A </s>", special_tokens=[("</s>", 1)])
    transformers.PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", eos_token="</s>",
                                         unk_token="<unk>").save_pretrained(root / "t5")
    transformers.T5EncoderModel(transformers.T5Config(
        vocab_size=8, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2,
        decoder_start_token_id=0)).save_pretrained(root / "t5")
    return root
