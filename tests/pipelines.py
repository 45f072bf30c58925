"""Whole pipelines of a few thousand parameters, built from configuration classes: real encoders, VAEs and schedulers, nothing from a hub."""

from __future__ import annotations

from typing import Any

import torch


def flux_pipeline(transformer: Any, seed: int = 0) -> Any:
    """FLUX.1 around a tiny transformer of sixteen-wide text: CLIP and T5 with tokenizers of bytes, a VAE that halves once."""
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline
    from transformers import CLIPTextModel

    config = transformer.config
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        clip_words, t5_words = clip_tokenizer(), t5_tokenizer()
        clip = CLIPTextModel(clip_config(clip_words, config.pooled_projection_dim, config.pooled_projection_dim))
        t5, vae = t5_encoder(t5_words, config.joint_attention_dim), halving_vae(config.in_channels // 4)
    return FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=vae,
        text_encoder=clip.eval(),
        tokenizer=clip_words,
        text_encoder_2=t5,
        tokenizer_2=t5_words,
        transformer=transformer,
    )


def sd3_pipeline(transformer: Any, seed: int = 0) -> Any:
    """Stable Diffusion 3 around a tiny transformer of sixteen-wide text: two CLIPs of half that width, T5, a VAE that halves once."""
    from diffusers import FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline
    from transformers import CLIPTextModelWithProjection

    config = transformer.config
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        clip_words, t5_words = clip_tokenizer(), t5_tokenizer()
        half = clip_config(clip_words, config.joint_attention_dim // 2, config.pooled_projection_dim // 2)
        clips = [CLIPTextModelWithProjection(half).eval() for _ in range(2)]
        t5, vae = t5_encoder(t5_words, config.joint_attention_dim), halving_vae(config.in_channels)
    return StableDiffusion3Pipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=vae,
        text_encoder=clips[0],
        tokenizer=clip_words,
        text_encoder_2=clips[1],
        tokenizer_2=clip_words,
        text_encoder_3=t5,
        tokenizer_3=t5_words,
        transformer=transformer,
    )


CHAT = "{% for message in messages %}<|im_start|>{{ message['role'] }} {{ message['content'] }}<|im_end|>{% endfor %}"


def flux2_pipeline(transformer: Any, seed: int = 0) -> Any:
    """FLUX.2 klein around a tiny transformer: a language model of 28 layers, of which three are read, a VAE that halves once."""
    from diffusers import AutoencoderKLFlux2, FlowMatchEulerDiscreteScheduler, Flux2KleinPipeline
    from transformers import Qwen3Config, Qwen3ForCausalLM

    config = transformer.config
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        words = qwen_tokenizer()
        words.chat_template, words.model_max_length = CHAT, 48
        text = Qwen3Config(
            vocab_size=len(words),
            hidden_size=config.joint_attention_dim // 3,
            intermediate_size=16,
            num_hidden_layers=28,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=4,
            max_position_embeddings=64,
        )
        encoder = Qwen3ForCausalLM(text).eval()
        vae = AutoencoderKLFlux2(
            block_out_channels=(8, 8),
            layers_per_block=1,
            down_block_types=("DownEncoderBlock2D", "DownEncoderBlock2D"),
            up_block_types=("UpDecoderBlock2D", "UpDecoderBlock2D"),
            norm_num_groups=4,
            latent_channels=config.in_channels // 4,
            use_quant_conv=False,
            use_post_quant_conv=False,
        )
        vae.bn.running_mean.normal_()
        vae.bn.running_var.uniform_(0.5, 2.0)
    return Flux2KleinPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(), vae=vae.eval(), text_encoder=encoder, tokenizer=words, transformer=transformer
    )


def clip_config(words: Any, width: int, projection: int) -> Any:
    from transformers import CLIPTextConfig

    return CLIPTextConfig(
        vocab_size=len(words),
        hidden_size=width,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=words.model_max_length,
        projection_dim=projection,
        bos_token_id=words.bos_token_id,
        eos_token_id=words.eos_token_id,
        pad_token_id=words.pad_token_id,
    )


def t5_encoder(words: Any, width: int) -> Any:
    from transformers import T5Config, T5EncoderModel

    return T5EncoderModel(T5Config(vocab_size=len(words), d_model=width, d_kv=8, d_ff=32, num_layers=2, num_heads=2)).eval()


def halving_vae(channels: int) -> Any:
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        block_out_channels=(8, 8),
        layers_per_block=1,
        down_block_types=("DownEncoderBlock2D", "DownEncoderBlock2D"),
        up_block_types=("UpDecoderBlock2D", "UpDecoderBlock2D"),
        norm_num_groups=4,
        latent_channels=channels,
        scaling_factor=0.36,
        shift_factor=0.12,
        use_quant_conv=False,
        use_post_quant_conv=False,
    ).eval()


def clip_tokenizer() -> Any:
    """Bytes, each alone and at a word's end."""
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import CLIPTokenizer

    letters = sorted(ByteLevel.alphabet())
    vocab = {word: i for i, word in enumerate([*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"])}
    return CLIPTokenizer(vocab=vocab, merges=[], model_max_length=40)


def t5_tokenizer() -> Any:
    """Printable letters of one piece each."""
    from transformers import T5Tokenizer

    pieces = ["<pad>", "</s>", "<unk>", "\u2581", *(chr(c) for c in range(33, 127))]
    return T5Tokenizer(vocab=[(piece, -float(n)) for n, piece in enumerate(pieces)], extra_ids=0, model_max_length=48)


TEMPLATE = (
    "Describe the image by detailing the color, shape, size, texture, quantity, text, spatial relationships of the objects and background:"
)
MEAN, STD = [0.1, -0.2, 0.3], [1.5, 0.5, 2.0]


def qwen_tokenizer() -> Any:
    """Bytes, and the template's words whole, so that the template is about as long as the 34 tokens that the pipeline drops."""
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import Qwen2Tokenizer

    vocab = {letter: i for i, letter in enumerate(sorted(ByteLevel.alphabet()))}
    merges = []
    for word in TEMPLATE.split():
        whole = "\u0120" + word
        for n in range(2, len(whole) + 1):
            if whole[:n] not in vocab:
                vocab[whole[:n]] = len(vocab)
                merges.append((whole[: n - 1], whole[n - 1]))
    made = Qwen2Tokenizer(vocab=vocab, merges=merges)
    made.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    return made


def qwen_text_encoder(vocabulary: int, hidden_size: int = 16) -> Any:
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    text = {"vocab_size": vocabulary, "hidden_size": hidden_size, "intermediate_size": 32, "num_hidden_layers": 2}
    text |= {"num_attention_heads": hidden_size // 8, "num_key_value_heads": 1, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
    text |= {"rope_scaling": {"type": "mrope", "mrope_section": [1, 1, 2]}, "max_position_embeddings": 2048}
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 32, "num_heads": 2, "out_hidden_size": hidden_size}
    config = Qwen2_5_VLConfig(text_config=text, vision_config=vision | {"fullatt_block_indexes": [0]})
    return Qwen2_5_VLForConditionalGeneration(config).eval()


def qwen_pipeline(transformer: Any, seed: int = 0) -> Any:
    """Qwen-Image around a tiny transformer of sixteen-wide text, with a VAE that halves once."""
    from diffusers import AutoencoderKLQwenImage, FlowMatchEulerDiscreteScheduler, QwenImagePipeline

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        words = qwen_tokenizer()
        vae = AutoencoderKLQwenImage(
            base_dim=8, z_dim=3, dim_mult=[1, 2], num_res_blocks=1, temperal_downsample=[False], latents_mean=MEAN, latents_std=STD
        )
        return QwenImagePipeline(
            scheduler=FlowMatchEulerDiscreteScheduler(),
            vae=vae.eval(),
            text_encoder=qwen_text_encoder(len(words)),
            tokenizer=words,
            transformer=transformer,
        )
