"""`make bench`: speed as ratios, each measured side by side with its peer in this one run."""

from tests.bench import bench_loader, bench_rng, bench_step

bench_loader.main()
bench_step.main()
bench_rng.main()
