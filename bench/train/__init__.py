"""Training benchmarks: steps and seconds to a fixed test accuracy or loss, this package against its peers."""
