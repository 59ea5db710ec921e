"""The command line of the runner. Results go to standard output as JSON, everything else to standard error."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
import time
from pathlib import Path
from typing import Any, Sequence

from .bundle import Bundle, read_bundle
from .files import RunnerError, write_json
from .imaging import find_images


def main(words: Sequence[str]) -> int:
    """Run a command; returns the exit status: 0 done, 1 some images failed, 2 nothing could be done."""
    arguments = _parser().parse_args(list(words))
    try:
        bundle = read_bundle(arguments.bundle)
        _need_tensorrt()
        status: int = arguments.run(bundle, arguments)
    except RunnerError as error:
        print(f"error: {error}", file=sys.stderr)  # noqa: T201
        return 2
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # Whoever read the results has gone.
        _drop_output()
        return 141
    except OSError as error:
        place = f"{error.filename}: " if error.filename else ""
        print(f"error: {place}{error.strerror or error}", file=sys.stderr)  # noqa: T201
        _drop_output()
        return 2
    return status


def _drop_output() -> None:
    """Keep Python from complaining once more when it flushes at the end what could not be written."""
    with contextlib.suppress(OSError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _parser() -> argparse.ArgumentParser:
    here = Path(sys.argv[0]).resolve().parent
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--bundle", type=Path, default=here, metavar="DIR", help="the bundle; default: where runner.py lies")
    common.add_argument("--engines", type=Path, metavar="DIR", help="folder of the engine; default: 'engine' in the bundle")
    parser = argparse.ArgumentParser(prog="runner.py", description="Build and run this bundle's TensorRT engine.")
    commands = parser.add_subparsers(dest="command", metavar="build | predict | benchmark")
    commands.required = True

    build = commands.add_parser("build", parents=[common], help="build the engine unless the one on disk fits")
    build.add_argument("--force", action="store_true", help="build in any case")
    build.add_argument("--no-fp16", action="store_true", help="what is not quantized runs in FP32")
    build.add_argument("--workspace", type=_positive, default=1024, metavar="MIB", help="scratch memory; default: 1024 MiB")
    build.add_argument(
        "--dla-core", type=int, choices=(0, 1), help="use this deep-learning accelerator, the GPU for the rest"
    )
    build.set_defaults(run=_build)

    predict = commands.add_parser("predict", parents=[common], help="score images: one JSON line each")
    predict.add_argument("paths", nargs="+", metavar="PATH", help="image files or folders")
    predict.add_argument("--category", help="the product shown, for its own threshold")
    predict.add_argument("--out", type=Path, metavar="DIR", help="folder for heat maps")
    predict.set_defaults(run=_predict)

    measure = commands.add_parser("benchmark", parents=[common], help="measure latency and throughput: one JSON document")
    measure.add_argument("--warm-up", type=_positive, default=20, metavar="N", help="images before measuring; default: 20")
    measure.add_argument(
        "--images", type=_positive, default=200, metavar="N", help="images of each measurement; default: 200"
    )
    measure.add_argument("--out", type=Path, metavar="FILE", help="write the document to this file too")
    measure.set_defaults(run=_benchmark)
    return parser


def _positive(word: str) -> int:
    number = int(word)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is not positive")
    return number


def _need_tensorrt() -> None:
    try:
        import pycuda.driver  # noqa: F401
        import tensorrt  # noqa: F401
    except ImportError as error:
        raise RunnerError(f"tensorrt and pycuda are needed on the device: {error}") from None


def _note(message: str) -> None:
    print(message, file=sys.stderr, flush=True)  # noqa: T201


def _emit(content: Any, indent: int | None = None) -> None:
    print(json.dumps(content, indent=indent, allow_nan=False), flush=True)  # noqa: T201


def _build(bundle: Bundle, arguments: argparse.Namespace) -> int:
    from .building import BuildOptions
    from .devices import gpu
    from .engines import EngineFiles, ensure_engine

    options = BuildOptions(not arguments.no_fp16, arguments.workspace, arguments.dla_core)
    files = EngineFiles(_engine_folder(bundle, arguments))
    with gpu() as device:
        if not ensure_engine(bundle, files, device, _note, options, arguments.force):
            _note(f"the engine fits and stays as it is: {files.engine}")
    return 0


def _predict(bundle: Bundle, arguments: argparse.Namespace) -> int:
    from .devices import gpu
    from .engines import EngineFiles, ensure_engine, load_engine
    from .inference import Session
    from .prediction import predict

    files = EngineFiles(_engine_folder(bundle, arguments))
    bundle.threshold(arguments.category)  # an unknown category is an error before anything is built
    paths = find_images(arguments.paths)
    if not paths:
        raise RunnerError("no image to predict; PNG, JPEG, BMP, TIFF and WebP are read, heat maps only where they are named")
    failed = 0
    with gpu() as device:
        ensure_engine(bundle, files, device, _note)
        with Session(load_engine(files), bundle) as session:
            for row in predict(session, bundle, paths, arguments.category, arguments.out):
                failed += row["error"] is not None
                _emit(row)
    if failed:
        _note(f"{failed} of {len(paths)} images could not be scored")
    return 1 if failed else 0


def _benchmark(bundle: Bundle, arguments: argparse.Namespace) -> int:
    import tensorrt as trt

    from .benchmarking import benchmark
    from .devices import gpu
    from .engines import EngineFiles, ensure_engine, load_engine
    from .inference import Session

    files = EngineFiles(_engine_folder(bundle, arguments))
    with gpu() as device:
        ensure_engine(bundle, files, device, _note)
        start = time.perf_counter()
        with Session(load_engine(files), bundle) as session:
            session.lanes[0].submit(lambda target: target.fill(0))
            session.lanes[0].fetch()
            first = time.perf_counter() - start
            measured = benchmark(session, bundle, arguments.warm_up, arguments.images)
    place = {"gpu": device.name, "compute_capability": device.compute_capability, "tensorrt": trt.__version__}
    document = {**place, "first_result_s": round(first, 3), **measured}
    if arguments.out is not None:
        write_json(arguments.out, document)
    _emit(document, indent=2)
    return 0


def _engine_folder(bundle: Bundle, arguments: argparse.Namespace) -> Path:
    return arguments.engines or bundle.folder / "engine"
