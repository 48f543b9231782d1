"""Evaluates weights on a nuScenes-format split: boxes by the official devkit, lanes in the MapTR flavour."""

import argparse

EXAMPLE = """example:
  python scripts/evaluate.py configs/synthetic/nano.py out/nano/nano.safetensors --json out/nano/evaluation.json
  python scripts/evaluate.py configs/synthetic/nano.py out/nano/epoch_24.pth --dataroot out/other_town --split val \\
      --json out/nano/other.json
"""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("config", help="the config that the weights were trained with")
    parser.add_argument("checkpoint", help=".safetensors that training exported, or a training checkpoint .pth")
    parser.add_argument("--dataroot", help="instead of the config's val_data.dataroot")
    parser.add_argument("--version", help="instead of the config's val_data.version")
    parser.add_argument("--split", help="instead of the config's val_data.split")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--workers", type=int, default=0, help="processes that load images (default 0)")
    parser.add_argument("--json", required=True, help="file for all numbers")
    arguments = parser.parse_args()

    import torch

    from perception.engine import build_dataset, load_config, load_weights
    from perception.errors import ConfigError
    from perception.evaluation.streaming import evaluate_stream
    from perception.files import write_json

    if arguments.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--device cuda: torch finds no GPU here; use --device cpu")
    told = {key: value for key in ("dataroot", "version", "split") if (value := getattr(arguments, key))}
    config = load_config(arguments.config, {f"val_data.{key}": value for key, value in told.items()})
    model = load_weights(arguments.checkpoint, config.model).to(arguments.device)
    dataset = build_dataset(config.val_data, config.model)
    evaluation, stream = evaluate_stream(model, dataset, workers=arguments.workers, progress=True)
    metrics = evaluation.as_dict() | {"fps": 1 / stream.seconds_per_frame, "samples": len(dataset)}

    print(evaluation.table())
    headline = {name: metrics[name] for name in ("nds", "map", "lane_map", "fps")}
    print("\n" + "  ".join(f"{name} {value:.3f}" for name, value in headline.items()))
    write_json(arguments.json, metrics)


if __name__ == "__main__":
    from perception.errors import run_script

    run_script(main)
