"""Prompt and response tokens against the tokenised rendering of the whole conversation, and what the limit does."""

import copy
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import TEMPLATE

from openrlhf_sgpo.data import Pair
from openrlhf_sgpo.data.tokens import ChatFormat, Group

END = "<|im_end|>"
CHAT = ("<|im_start|>", END)
PLENTY = 10_000
QUESTION = [{"role": "user", "content": "Why?"}]
TALK = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hello\n"},
    {"role": "assistant", "content": "Hi"},
    *QUESTION,
]


@pytest.fixture(scope="module")
def tokenizer(tiny_model):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tiny_model)


@pytest.fixture(scope="module")
def chat(tokenizer):
    return ChatFormat(tokenizer, max_len=PLENTY)


def conversation_tokens(tokenizer, messages, text):
    """The fully rendered conversation up to and including the last end of turn."""
    whole = tokenizer.apply_chat_template([*messages, {"role": "assistant", "content": text}], tokenize=False)
    upto = whole[: whole.rindex(END) + len(END)]
    assert upto != whole  # the template does write something behind it
    return tuple(tokenizer(upto, add_special_tokens=False)["input_ids"])


@settings(max_examples=50)
@given(messages=st.sampled_from([QUESTION, TALK]), text=st.text(min_size=1).filter(lambda text: "<|" not in text))
def test_prompt_and_response_are_the_rendered_conversation(tokenizer, chat, messages, text):
    prompt, response = chat.prompt(messages), chat.response(text, truncated=False, room=PLENTY)
    assert prompt + response == conversation_tokens(tokenizer, messages, text)
    assert tokenizer.decode(prompt).endswith("<|im_start|>assistant\n")
    assert response[-1] == tokenizer.convert_tokens_to_ids(END)


def test_truncated_response_has_no_end_of_turn(tokenizer, chat):
    whole = chat.response("Because", truncated=False, room=PLENTY)
    cut = chat.response("Because", truncated=True, room=PLENTY)
    assert cut + chat.end_of_turn == whole
    assert tokenizer.decode(cut) == "Because"
    assert chat.end_of_turn == (tokenizer.convert_tokens_to_ids(END),)


def test_template_without_end_of_turn_ends_with_eos(tokenizer):
    bare = copy.deepcopy(tokenizer)
    bare.chat_template = "{% for message in messages %}{{ message['content'] }}\n{% endfor %}"
    assert ChatFormat(bare, PLENTY).end_of_turn == (tokenizer.eos_token_id,)


def test_no_template(tokenizer):
    bare = copy.deepcopy(tokenizer)
    bare.chat_template = None
    with pytest.raises(ValueError, match="no chat template: start from a supervised fine-tuned") as caught:
        ChatFormat(bare, PLENTY)
    assert str(bare.name_or_path) in str(caught.value)


def test_no_double_beginning_of_sequence(tokenizer):
    from tokenizers import processors

    greedy = copy.deepcopy(tokenizer)
    begin = greedy.convert_tokens_to_ids("<|endoftext|>")
    greedy.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", begin)]
    )
    greedy.chat_template = "{{ '<|endoftext|>' }}" + tokenizer.chat_template
    assert greedy("<|endoftext|>x")["input_ids"][:2] == [begin, begin]  # what the format must not do
    chat = ChatFormat(greedy, PLENTY)
    prompt = chat.prompt(TALK)
    assert prompt[0] == begin and prompt.count(begin) == 1
    assert begin not in chat.response("Because", truncated=False, room=PLENTY)


def pair_of(chosen, rejected, prompt=QUESTION, **flags):
    return Pair(id="pair", prompt=prompt, chosen=chosen, rejected=rejected, **flags)


def test_pair(tokenizer, chat):
    group = chat.pair(pair_of("Because.", "No", rejected_truncated=True))
    assert group is not None
    chosen, rejected = group.responses
    assert group.prompt + chosen == conversation_tokens(tokenizer, QUESTION, "Because.")
    assert group.prompt + rejected + chat.end_of_turn == conversation_tokens(tokenizer, QUESTION, "No")
    assert len(group) == len(group.prompt) + len(chosen) + len(rejected)


def test_same_text_cut_and_ended_are_two_responses(chat):
    group = chat.pair(pair_of("No", "No", rejected_truncated=True))
    assert group is not None and group.responses[0] == group.responses[1] + chat.end_of_turn


@pytest.mark.parametrize("missing", [0, 1, 2, 5])
def test_limit_cuts_the_response_and_its_end_of_turn(tokenizer, chat, missing):
    pair = pair_of("Because it is so.", "No")
    whole = chat.pair(pair)
    assert whole is not None
    max_len = len(whole.prompt) + len(whole.responses[0]) - missing
    group = ChatFormat(tokenizer, max_len).pair(pair)
    assert group is not None
    chosen, rejected = group.responses
    assert group.prompt == whole.prompt and rejected == whole.responses[1]
    assert len(group.prompt) + len(chosen) == max_len
    assert chosen == whole.responses[0][: len(whole.responses[0]) - missing]
    assert (chat.end_of_turn[0] in chosen) == (missing == 0)


def test_pair_that_the_limit_makes_equal_is_dropped(tokenizer, chat):
    pair = pair_of("same start, A", "same start, B")
    room_for_difference = len(chat.prompt(QUESTION)) + len("same start, A")
    assert isinstance(ChatFormat(tokenizer, room_for_difference).pair(pair), Group)
    assert ChatFormat(tokenizer, room_for_difference - 1).pair(pair) is None


def test_overlong_prompt_is_dropped(tokenizer, chat):
    pair, length = pair_of("A", "B"), len(chat.prompt(QUESTION))
    fitting = ChatFormat(tokenizer, length + 2)
    assert fitting.fits(fitting.prompt(QUESTION))
    group = fitting.pair(pair)
    assert group is not None and [len(response) for response in group.responses] == [2, 2]
    for max_len in (length + 1, length, 1):
        tight = ChatFormat(tokenizer, max_len)
        assert not tight.fits(tight.prompt(QUESTION)) and tight.pair(pair) is None


def test_a_tokenizer_that_opens_every_text_with_a_space_does_not_do_so_for_responses():
    """SentencePiece's habit: alone, "Hi" is "_Hi"; behind the generation prompt, as sampled, it is not."""
    from tokenizers import Tokenizer, models, normalizers
    from transformers import PreTrainedTokenizerFast

    special = ["<s>", "</s>", "<|assistant|>", "<|user|>"]
    letters = ["\u2581", *"\n?Hiresponx"]
    vocabulary = {token: index for index, token in enumerate(special + letters)}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")
    tokenizer.add_special_tokens({"additional_special_tokens": special[2:]})
    tokenizer.chat_template = (
        "{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] + '</s>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
    )
    alone = tokenizer("Hi", add_special_tokens=False)["input_ids"]
    assert alone[0] == vocabulary["\u2581"], "the tokenizer of this test must have the habit"
    response = ChatFormat(tokenizer, 64).response("Hi", truncated=False, room=10)
    assert response == (vocabulary["H"], vocabulary["i"], vocabulary["</s>"])


def byte_level():
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers

    backend = Tokenizer(models.BPE())
    backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(True), pre_tokenizers.ByteLevel(False)])
    return backend, trainers.BpeTrainer(initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), vocab_size=400)


def sentence_piece():
    from tokenizers import Tokenizer, models, normalizers, trainers

    backend = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    return backend, trainers.BpeTrainer(special_tokens=["<unk>", *(f"<0x{byte:02X}>" for byte in range(256))])


def unigram():
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers

    backend = Tokenizer(models.Unigram())
    backend.normalizer, backend.pre_tokenizer = normalizers.NFKC(), pre_tokenizers.Metaspace()
    return backend, trainers.UnigramTrainer(special_tokens=["<unk>"], unk_token="<unk>", vocab_size=200)


def word_piece():
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers

    backend = Tokenizer(models.WordPiece(unk_token="<unk>"))
    backend.normalizer, backend.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    return backend, trainers.WordPieceTrainer(special_tokens=["<unk>"], vocab_size=300)


@pytest.mark.parametrize("kind", [byte_level, sentence_piece, unigram, word_piece])
def test_tokens_are_those_that_a_call_of_the_tokenizer_returns(kind):
    """Of every kind of tokenizer, also if its file asks for cuts, padding and special tokens; alone and with others."""
    from tokenizers import processors
    from transformers import PreTrainedTokenizerFast

    corpus = Path(__file__).read_text()
    backend, trainer = kind()
    backend.train_from_iterator(corpus.split("\n"), trainer)
    backend.add_special_tokens(["<s>", "</s>", *CHAT])
    begin = backend.token_to_id("<s>")
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", begin)])
    backend.enable_truncation(max_length=5)
    backend.enable_padding(length=9)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    tokenizer.chat_template = TEMPLATE
    expected = copy.deepcopy(tokenizer)
    chat = ChatFormat(tokenizer, PLENTY)
    assert chat._in_rust

    @settings(max_examples=100)
    @given(st.lists(st.text() | st.sampled_from([*CHAT, f"a {CHAT[1]}\n b", "e\u0301 \ufb01 12", corpus]), max_size=4))
    def check(texts):
        ids = [tuple(expected(text, add_special_tokens=False)["input_ids"]) for text in texts]
        assert chat._encode_all(texts) == ids == [chat._encode(text) for text in texts]

    check()


def test_a_tokenizer_that_does_more_than_its_part_in_rust_is_called(tokenizer):
    class Lower(type(tokenizer)):
        def _encode_plus(self, text, *arguments, **more):
            return super()._encode_plus([part.lower() for part in text], *arguments, **more)

    lower = copy.deepcopy(tokenizer)
    lower.__class__ = Lower
    pair = pair_of("BECAUSE", "No")
    prompt, (chosen, rejected) = ChatFormat(lower, PLENTY).encode([pair])[0]
    assert lower.decode(chosen) == "because" and lower.decode(rejected) == "no" and "why?" in lower.decode(prompt)


SPECIAL = st.sampled_from(["", END, f"a{END}", f"{END}{END}", f"So{END} it is", "<|im_start|>"])


@settings(max_examples=200)
@given(
    texts=st.tuples(st.text(max_size=30) | SPECIAL, st.text(max_size=30) | SPECIAL),
    marked=st.tuples(st.booleans(), st.booleans()),
    missing=st.integers(0, 40),
)
def test_a_cut_response_never_ends_with_an_end_of_turn(tokenizer, texts, marked, missing):
    """Whether the limit cuts it or a flag says that it was cut, and whatever the text holds."""
    pair = pair_of(*texts, chosen_truncated=marked[0], rejected_truncated=marked[1])
    (tokens,) = ChatFormat(tokenizer, PLENTY).encode([pair])
    chat = ChatFormat(tokenizer, max(1, len(tokens.prompt) + max(map(len, tokens.responses)) + 1 - missing))
    group, (end,) = chat.group(pair, tokens), chat.end_of_turn
    assert group == chat.pair(pair)
    if group is None:
        return
    room = chat.max_len - len(group.prompt)
    for text, whole, cut, response in zip(texts, tokens.responses, marked, group.responses, strict=True):
        assert len(response) <= room
        if cut or len(whole) >= room:
            assert response[-1] != end and response == whole[: len(response)]
            if END not in text:
                assert end not in response and len(response) == min(room, len(whole))
        else:
            assert response == (*whole, end)


def test_an_end_of_turn_of_several_tokens_is_there_as_a_whole_or_not_at_all(tokenizer):
    lengthy = copy.deepcopy(tokenizer)
    lengthy.chat_template = tokenizer.chat_template.replace("<|im_end|>", "###")
    pair = pair_of("Because it is so.", "No", rejected_truncated=True)
    (tokens,) = ChatFormat(lengthy, PLENTY).encode([pair])
    text = tokens.responses[0]
    for room in range(2, len(text) + 5):
        chat = ChatFormat(lengthy, len(tokens.prompt) + room)
        assert len(chat.end_of_turn) == 3
        group = chat.group(pair, tokens)
        assert group is not None
        whole = room >= len(text) + 3
        assert group.responses == (text + chat.end_of_turn if whole else text[:room], tokens.responses[1])


@settings(max_examples=20)
@given(st.lists(st.tuples(st.sampled_from([QUESTION, TALK]), st.text(), st.text()), max_size=5))
def test_all_at_once_is_one_by_one(tokenizer, chat, rows):
    pairs = [pair_of(chosen, rejected, prompt=prompt) for prompt, chosen, rejected in rows]
    groups = [chat.group(pair, tokens) for pair, tokens in zip(pairs, chat.encode(pairs), strict=True)]
    assert groups == [chat.pair(pair) for pair in pairs]
    assert chat.prompts([pair.prompt for pair in pairs]) == [chat.prompt(pair.prompt) for pair in pairs]


def test_each_prompt_is_rendered_and_tokenised_once(tokenizer, monkeypatch):
    """Inspection, rollout, oracle and training ask for the same prompts; sampled responses keep their tokens."""
    chat, rendered, tokenised = ChatFormat(tokenizer, PLENTY), [], []
    render, encode = chat.template.prompt, chat._encode_all
    monkeypatch.setattr(chat.template, "prompt", lambda *given: rendered.append(given[0]) or render(*given))
    monkeypatch.setattr(chat, "_encode_all", lambda texts: tokenised.extend(texts) or encode(texts))
    pair = replace(pair_of("A", "B"), chosen_token_ids=(5, 6), rejected_token_ids=(7,))
    expected = chat.pair(pair)
    assert expected.responses == ((5, 6), (7,)) and len(tokenised) == 1
    assert chat.prompts([QUESTION, TALK, TALK, QUESTION])[0] is chat.prompt(QUESTION) is expected.prompt
    assert chat.pair(pair) == expected
    assert rendered == [QUESTION, TALK] and len(tokenised) == 2


def test_a_conversation_that_the_template_refuses_has_no_tokens(tokenizer):
    strict = copy.deepcopy(tokenizer)
    strict.chat_template = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}" + (
        tokenizer.chat_template
    )
    chat = ChatFormat(strict, PLENTY)
    assert [tokens is None for tokens in chat.prompts([TALK, QUESTION])] == [True, False]
    assert chat.pair(pair_of("A", "B", prompt=TALK)) is None


def test_neither_template_nor_tokenizer_has_an_end(tokenizer):
    endless = copy.deepcopy(tokenizer)
    endless.chat_template = "{% for message in messages %}{{ message['content'] }}\n{% endfor %}"
    endless.eos_token = None
    with pytest.raises(
        ValueError, match="has no end-of-sequence token, and its chat template puts nothing after a response"
    ):
        ChatFormat(endless, PLENTY)
