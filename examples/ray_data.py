"""Images as a step of a Ray Data pipeline: rows that say what is wanted in, the same rows with pixels out.

    pip install "stepfusion[ray]"
    python examples/ray_data.py --num 1000 --out images      # a folder of Parquet files

Here Ray Data owns the data, and the engine is a function of a batch of rows. What one needs for a million images that
must survive a kill is another thing, and is there: ``stepfusion generate --ray`` (docs/bulk.md).

An image is a function of its row alone: rows may be split, sorted and retried, and come out equal to the bit, for the
engine is invariant.
"""

from __future__ import annotations

import argparse
from typing import Any

import numpy as np

import stepfusion as sf

Batch = dict[str, np.ndarray]


class Sampler:
    """An actor that holds an engine: called with a batch of rows, it returns them with their pixels.

    Args:
        model: as for :meth:`stepfusion.Engine.from_pretrained`; every machine must have it.
        steps: of DDIM.
        guidance: 1 is none.
    """

    def __init__(self, model: str, steps: int = 25, guidance: float = 1.5, **engine: Any) -> None:
        self.engine = sf.Engine.from_pretrained(model, invariant=True, **engine)
        self.asked = {"steps": steps, "guidance": guidance}

    def __call__(self, batch: Batch) -> Batch:
        """``seed``, ``index`` and ``label``, int64 [n] each, to themselves and ``image``, uint8 [n, H, W, C]."""
        seeds, indices, labels = (batch[name].tolist() for name in ("seed", "index", "label"))
        images = self.engine.sample(seed=seeds, indices=indices, labels=labels, progress=False, **self.asked)
        return {**batch, "image": self.engine.to_uint8(images).cpu().numpy()}


def wanted(row: dict[str, int], classes: int, seed: int) -> dict[str, int]:
    """What image ``id`` is to be: the classes take turns."""
    return {"seed": seed, "index": row["id"], "label": row["id"] % classes}


def main() -> None:
    """Run the pipeline."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="fashion-mnist")
    parser.add_argument("--num", type=int, default=1000)
    parser.add_argument("--classes", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--workers", type=int, default=1, help="engines (default: %(default)s)")
    parser.add_argument("--gpus", type=float, default=0, help="of each engine (default: %(default)s)")
    parser.add_argument("--out", required=True)
    options = parser.parse_args()

    import ray

    rows = ray.data.range(options.num).map(wanted, fn_kwargs={"classes": options.classes, "seed": options.seed})
    images = rows.map_batches(
        Sampler,
        fn_constructor_kwargs={"model": options.model, "steps": options.steps},
        batch_size=64,
        compute=ray.data.ActorPoolStrategy(size=options.workers),
        num_gpus=options.gpus,
    )
    images.write_parquet(options.out)
    print(f"{ray.data.read_parquet(options.out).count()} images in {options.out}")


if __name__ == "__main__":
    main()
