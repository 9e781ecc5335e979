//! Dropout: the CPU's bits, wherever the elements' numbers begin and however rows are cut.

use half::{bf16, f16};
use shardwise_kernels::Threads;
use shardwise_kernels::dropout::Mask;

use super::{Device, Float, Random, SameBits, host, in_both_orders};

fn check<T: Float>(mask: &Mask, numel: usize, what: &str) {
    let x: Vec<T> = Random(20).any(numel);
    let mut expected = x.clone();
    mask.apply(Threads::ONE, &x, &mut expected);
    for (x_offset, out_offset) in [(0, 0), (1, 1), (8, 3)] {
        let dropped = in_both_orders(|order| {
            let mut from = Device::new(&x, x_offset);
            let mut out = Device::new(&vec![T::round(f32::NAN); numel], out_offset);
            host().launch(&mask.cuda_apply(T::TYPE, from.ptr(), out.ptr(), numel as u64), order);
            from.get().assert_same(&x, "read only");
            out.get()
        });
        dropped.assert_same(&expected, &format!("{what}, {numel} elements at {x_offset} and {out_offset}"));
    }
    let in_place = in_both_orders(|order| {
        let mut x = Device::new(&x, 0);
        let at = x.ptr();
        host().launch(&mask.cuda_apply(T::TYPE, at, at, numel as u64), order);
        x.get()
    });
    in_place.assert_same(&expected, "in place");
}

fn check_all<T: Float>() {
    let mask = |first| Mask::new((3 << 40) + 7, "h.0.mlp", first, 0.3);
    // Each word of a block first, and numbers of more than 32 bits.
    for first in [0, 1, 2, 3, 64, (1 << 40) + 5] {
        for numel in [0, 1, 4, 7, 8, 257, 5003] {
            check::<T>(&mask(first), numel, &format!("from {first}"));
        }
    }
    // Parts that vectors divide and that they do not, whole rows, rows of a part that is empty.
    for (row_numel, part) in
        [(64, 16..48), (64, 0..64), (12, 4..10), (301, 67..130), (1, 0..1), (4096, 4088..4096), (10, 4..4)]
    {
        for first in [0, (3 << 33) + 6] {
            let what = format!("{part:?} of rows of {row_numel} from {first}");
            check::<T>(&mask(first).of_part(row_numel, part.clone()), 7 * part.len(), &what);
        }
    }
}

#[test]
fn dropout_is_the_cpus() {
    check_all::<f32>();
    check_all::<bf16>();
    check_all::<f16>();
}

#[test]
fn no_rate_drops_nothing() {
    check::<f32>(&Mask::new(1, "x", 5, 0.0), 100, "a rate of 0");
    check::<f32>(&Mask::new(1, "x", 5, 1.0 - 1e-12), 100, "a rate of almost 1");
}

#[test]
#[should_panic(expected = "element numbers fit 64 bits")]
fn numbers_beyond_64_bits_are_refused() {
    let nowhere = shardwise_kernels::cuda::DevicePtr::NULL;
    let _ = Mask::new(1, "x", u64::MAX - 5, 0.1).cuda_apply(f32::TYPE, nowhere, nowhere, 9);
}
