//! How the microbenchmarks of all crates measure, and what of it they share. Measured is the processor's time of the measuring thread.
//!
//! The clock on the wall also counts whoever else wanted the processor, which on a busy machine is more than the differences
//! that are looked for. System calls that copy or scan work in the calling thread, so nothing is lost by this. What others
//! do for the thread (a helper, a tracer) is measured by the clock on the wall, with `iter_custom`.

#![allow(dead_code, reason = "each benchmark uses a part of it")]

use std::time::Duration;

use criterion::Criterion;
use criterion::measurement::{Measurement, ValueFormatter, WallTime};
use rustix::time::{ClockId, clock_gettime};

/// Criterion with this clock.
pub(crate) type Bench = Criterion<CpuTime>;

/// How long a benchmark runs before it counts.
const WARM_UP: Duration = Duration::from_millis(150);
/// How long it is measured: all of them together stay below two minutes.
const MEASURED: Duration = Duration::from_millis(750);
/// Samples of a benchmark: enough for a median and its interval.
const SAMPLES: usize = 15;
/// How often the samples are drawn from anew for that interval.
const RESAMPLES: usize = 5000;

/// Criterion as all benchmarks want it, with the command line's wishes.
pub(crate) fn criterion() -> Bench {
    let criterion = Criterion::default().with_measurement(CpuTime).without_plots();
    let criterion = criterion.warm_up_time(WARM_UP).measurement_time(MEASURED);
    criterion.sample_size(SAMPLES).nresamples(RESAMPLES).configure_from_args()
}

/// Time that this thread has spent on a processor, in user mode and in the kernel.
pub(crate) fn now() -> Duration {
    let time = clock_gettime(ClockId::ThreadCPUTime);
    Duration::new(time.tv_sec.unsigned_abs(), u32::try_from(time.tv_nsec).unwrap_or(0))
}

/// What `work` costs this thread.
pub(crate) fn cpu_time(work: impl FnOnce()) -> Duration {
    let began = now();
    work();
    now() - began
}

/// The clock.
pub(crate) struct CpuTime;

impl Measurement for CpuTime {
    type Intermediate = Duration;
    type Value = Duration;

    fn start(&self) -> Duration {
        now()
    }

    fn end(&self, began: Duration) -> Duration {
        now() - began
    }

    fn add(&self, a: &Duration, b: &Duration) -> Duration {
        *a + *b
    }

    fn zero(&self) -> Duration {
        Duration::ZERO
    }

    fn to_f64(&self, value: &Duration) -> f64 {
        value.as_nanos() as f64
    }

    fn formatter(&self) -> &dyn ValueFormatter {
        const { &WallTime }.formatter()
    }
}

/// Numbers that look random, the same each time (xorshift64*).
pub(crate) fn random() -> impl Iterator<Item = u64> {
    let mut state = 1u64;
    std::iter::repeat_with(move || {
        state ^= state >> 12;
        state ^= state << 25;
        state ^= state >> 27;
        state.wrapping_mul(0x2545_f491_4f6c_dd1d)
    })
}

/// Bytes that no compression makes smaller.
pub(crate) fn noise(bytes: usize) -> Vec<u8> {
    random().flat_map(u64::to_le_bytes).take(bytes).collect()
}
