"""Images -> the tokens of one frozen encoder, in shards that mirror the image shards row for row.

    accelerate launch --num_processes=8 cache_tokens.py --enc-type dinov2-vit-b --tokens-name dinov2-vit-b

writes data/dinov2-vit-b/: tokens (T,D) of every image, with a fingerprint of the encoder's weights. With them
train_ldm_only.py --cached-tokens runs no encoder and reads no pixels; they are larger than those, and
docs/cached-tokens.md says when they pay. Each shard is written whole by one process, so running the same command again
continues where it stopped, on any number of processes.
"""

import argparse

from torch import Tensor

from dataset import TOKEN_FORMAT, TOKENS, cache_directory, open_images
from errors import Parser, run_script
from models.encoders import IMAGE_STRIDE, Encoder, encoder_specs
from training.cached_tokens import pack_tokens
from training.cli import (
    POSITIVE,
    add_caching_flags,
    add_enc_ckpt_flag,
    add_offline_flag,
    add_precision_flag,
    add_resample_flag,
    enc_type,
)
from training.config import parse_flags
from training.distributed import process_state
from training.encoder_weights import encoder_fingerprints, load_encoders
from training.networks import use_tf32
from training.precision import autocast_factory
from training.shard_caching import Cache, cache_images, check_name, describe_cache

DTYPES = ("float16", "int8")


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = Parser(__doc__)
    parser.add_argument("--enc-type", required=True, type=enc_type, help="one encoder of the README's table")
    parser.add_argument("--tokens-name", required=True, help="folder below --output-dir")
    parser.add_argument(
        "--token-grid",
        type=POSITIVE,
        help="tokens a side, as many as the transformer has (default: one for 16 pixels)",
    )
    parser.add_argument(
        "--dtype",
        default="float16",
        choices=DTYPES,
        help="int8, with a scale a token, halves the disk (default: float16)",
    )
    add_precision_flag(parser, default="no")
    add_enc_ckpt_flag(parser)
    add_resample_flag(parser)
    add_offline_flag(parser)
    add_caching_flags(parser)
    args = parse_flags(parser, argv, "cache_tokens")
    if len(encoder_specs(args.enc_type)) != 1:
        parser.error(f"--enc-type {args.enc_type}: expected one encoder; each has a folder of its own")
    if "," in args.tokens_name:
        parser.error(f"--tokens-name {args.tokens_name!r}: --cached-tokens joins names by commas; choose another")
    check_name(parser, "--tokens-name", args.tokens_name, args.output_dir, "tokens")
    return args


def describe(images, encoder: Encoder, args: argparse.Namespace) -> dict:
    """What the index says of the cache, but for its shards."""
    network = {
        "mixed_precision": args.mixed_precision,
        "encoder": args.enc_type,
        "encoder_fingerprint": encoder_fingerprints(args, [encoder])[args.enc_type],
    }
    return describe_cache(images, args, TOKEN_FORMAT, [encoder.token_grid**2, encoder.spec.embed_dim], network)


def main() -> None:
    """Encode every shard that is not there yet, then write the index."""
    args = parse_args()
    use_tf32(args.allow_tf32)
    images = open_images(args.data_dir)
    args.resolution = images.resolution  # as training's flag, which encoders are sized by
    grid = args.token_grid or max(images.resolution // IMAGE_STRIDE, 1)
    state = process_state()
    (encoder,) = load_encoders(args, grid, state.device, say=state.print)
    autocast = autocast_factory(state.device, args.mixed_precision)

    def encode(pixels: Tensor) -> tuple[Tensor, ...]:
        with autocast():
            tokens = encoder(pixels)
        return pack_tokens(tokens, args.dtype)

    cache = Cache(
        what="tokens",
        directory=cache_directory(args.output_dir, args.tokens_name),
        kind=TOKENS,
        index=describe(images, encoder, args),
        origin="encoder_fingerprint",
        others="another encoder or grid, other weights or images, --dtype, --mixed-precision or --mirrored; delete it, "
        "or choose another --tokens-name",
        instead="use --mixed-precision no, or --dtype int8",
    )
    cache_images(cache, images, encode, args, state)


if __name__ == "__main__":
    run_script(main)
