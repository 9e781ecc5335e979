//! Both paths against formulas in `f64`, on shapes that divide into nothing.
//!
//! The tolerance is a bound, element by element. A rounding to bf16 changes a number by at most 1/256 of it. The
//! vector path rounds each factor `P` or `dS` of a sum once, which moves the sum by at most that part of the sum
//! of magnitudes, and both paths round the result. What `f32` arithmetic adds is of the order of 1e-6 of the
//! magnitudes, more where scores are large: a score of 1000 is known to 6e-5, and its exponential no better.

use half::bf16;

use super::*;
use crate::philox;

/// The largest relative change by rounding to bf16.
const BF16_ROUNDING: f64 = 1.0 / 256.0;
/// Error of `f32` arithmetic relative to the magnitudes of a sum, for scores of order 10.
const F32_ARITHMETIC: f64 = 2e-5;

/// Nothing is rounded to bf16 before the result.
const IN_F32: Tolerance = Tolerance { terms: 0.0, parts: F32_ARITHMETIC };
/// One factor of each term is rounded to bf16.
const IN_BF16: Tolerance = Tolerance { terms: BF16_ROUNDING, parts: F32_ARITHMETIC };

const SCALE: f32 = 0.125;

/// Where a tensor's elements lie.
#[derive(Debug, Clone, Copy)]
enum Layout {
    HeadsFirst,
    PositionsFirst,
    /// Positions first, with gaps between heads, positions and sequences.
    Padded,
}

const LAYOUTS: [Layout; 3] = [Layout::HeadsFirst, Layout::PositionsFirst, Layout::Padded];

impl Layout {
    fn strides(self, shape: &Shape, heads: usize) -> Strides {
        match self {
            Layout::HeadsFirst => Strides::heads_first(shape, heads),
            Layout::PositionsFirst => Strides::positions_first(shape, heads),
            Layout::Padded => {
                let position = heads * (shape.head_dim + 3) + 5;
                Strides { batch: shape.seq * position + 7, head: shape.head_dim + 3, position }
            }
        }
    }
}

/// A tensor `[batch, heads, seq, head_dim]` in some layout.
#[derive(Clone)]
struct Tensor {
    data: Vec<bf16>,
    strides: Strides,
    shape: Shape,
    heads: usize,
}

impl Tensor {
    /// NaN everywhere, gaps included: who reads a gap, or leaves an element out, is found.
    fn blank(shape: &Shape, heads: usize, layout: Layout) -> Self {
        let strides = layout.strides(shape, heads);
        let numel = shape.batch * strides.batch.max(strides.head * heads);
        Tensor { data: vec![bf16::NAN; numel], strides, shape: *shape, heads }
    }

    fn random(name: &str, std: f32, shape: &Shape, heads: usize, layout: Layout) -> Self {
        let mut tensor = Self::blank(shape, heads, layout);
        let mut numbers = vec![0.0; shape.batch * heads * shape.seq * shape.head_dim];
        philox::fill_normal_on(Threads::ONE, 7, name, 0, 0.0, std, &mut numbers);
        for (at, x) in tensor.elements().into_iter().zip(numbers) {
            tensor.data[at] = bf16::from_f32(x);
        }
        tensor
    }

    /// Indices of the elements, by batch, head, position and dimension.
    fn elements(&self) -> Vec<usize> {
        let Shape { batch, seq, head_dim, .. } = self.shape;
        let mut elements = Vec::new();
        for b in 0..batch {
            for h in 0..self.heads {
                for i in 0..seq {
                    let first = b * self.strides.batch + h * self.strides.head + i * self.strides.position;
                    elements.extend(first..first + head_dim);
                }
            }
        }
        elements
    }

    fn values(&self) -> Vec<f64> {
        self.elements().into_iter().map(|at| self.data[at].to_f64()).collect()
    }

    fn bits(&self) -> Vec<u16> {
        self.elements().into_iter().map(|at| self.data[at].to_bits()).collect()
    }

    fn read(&self) -> Operand<'_> {
        Operand::new(&self.data, self.strides)
    }

    fn write(&mut self) -> OperandMut<'_> {
        OperandMut::new(&mut self.data, self.strides)
    }
}

struct Inputs {
    shape: Shape,
    layout: Layout,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dout: Tensor,
}

struct Outputs {
    out: Tensor,
    lse: Vec<f32>,
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
}

impl Inputs {
    fn random(shape: Shape, layout: Layout, std: f32) -> Self {
        let Shape { heads, kv_heads, .. } = shape;
        Inputs {
            shape,
            layout,
            q: Tensor::random("q", std, &shape, heads, layout),
            k: Tensor::random("k", std, &shape, kv_heads, layout),
            v: Tensor::random("v", 1.0, &shape, kv_heads, layout),
            dout: Tensor::random("dout", 1.0, &shape, heads, layout),
        }
    }

    fn run(&self, path: Path, threads: usize) -> Outputs {
        let Inputs { shape, layout, q, k, v, dout } = self;
        let (shape, threads) = (*shape, Threads::new(threads).unwrap());
        let blank = |heads| Tensor::blank(&shape, heads, *layout);
        let (mut out, mut dq) = (blank(shape.heads), blank(shape.heads));
        let (mut dk, mut dv) = (blank(shape.kv_heads), blank(shape.kv_heads));
        let mut lse = vec![f32::NAN; shape.batch * shape.heads * shape.seq];
        let (q, k, v, scale) = (q.read(), k.read(), v.read(), SCALE);
        forward_by(path, threads, &Forward { shape, scale, q, k, v, out: &out.write() }, &mut lse);
        let (dq_, dk_, dv_) = (dq.write(), dk.write(), dv.write());
        let (out_, dout) = (out.read(), dout.read());
        let inputs = Backward { shape, scale, q, k, v, out: out_, dout, dq: &dq_, dk: &dk_, dv: &dv_ };
        backward_by(path, threads, &inputs, &lse);
        Outputs { out, lse, dq, dk, dv }
    }
}

/// Sums, and what their errors are measured by.
#[derive(Clone)]
struct Exact {
    sums: Vec<f64>,
    /// The sum of magnitudes of the terms.
    terms: Vec<f64>,
    /// The same, with the magnitudes of what the terms themselves are sums of.
    parts: Vec<f64>,
}

/// Relative errors that a path may make.
#[derive(Clone, Copy)]
struct Tolerance {
    /// Of each term of a sum.
    terms: f64,
    /// Of the parts of each term.
    parts: f64,
}

impl Exact {
    fn zeros(numel: usize) -> Self {
        Exact { sums: vec![0.0; numel], terms: vec![0.0; numel], parts: vec![0.0; numel] }
    }

    /// Adds `factor * x`, where `factor` is a sum of parts of magnitude `parts`.
    fn add(&mut self, first: usize, factor: f64, parts: f64, x: &[f64]) {
        for (d, x) in x.iter().enumerate() {
            self.sums[first + d] += factor * x;
            self.terms[first + d] += (factor * x).abs();
            self.parts[first + d] += (parts * x).abs();
        }
    }

    fn check(&self, what: &str, got: &Tensor, tolerance: Tolerance) {
        let got = got.values();
        assert_eq!(got.len(), self.sums.len());
        let norm = |x: &[f64]| x.iter().map(|x| x * x).sum::<f64>().sqrt();
        let mut errors = Vec::new();
        for (at, (&got, &sum)) in got.iter().zip(&self.sums).enumerate() {
            let bound = tolerance.terms * self.terms[at] + tolerance.parts * self.parts[at];
            let bound = bound + BF16_ROUNDING * (sum.abs() + bound) + f64::from(f32::MIN_POSITIVE);
            assert!((got - sum).abs() <= bound, "{what}[{at}]: {got:e}, expected {sum:e} within {bound:e}");
            errors.push(got - sum);
        }
        // Roundings are independent, so all together they amount to less than their bounds.
        let bound =
            (tolerance.terms + BF16_ROUNDING) * norm(&self.sums) + tolerance.parts * norm(&self.parts);
        let error = norm(&errors);
        assert!(error <= bound, "{what}: error `{error:e}`, expected at most `{bound:e}`");
    }
}

/// The formulas of the module, in `f64`. Gradients are those for the given `out`, as they take it for granted.
struct Formulas {
    out: Exact,
    lse: Vec<f64>,
    dq: Exact,
    dk: Exact,
    dv: Exact,
}

impl Formulas {
    fn of(inputs: &Inputs, given_out: &Tensor) -> Self {
        let Shape { batch, heads, kv_heads, seq, head_dim: dim } = inputs.shape;
        let scale = f64::from(SCALE);
        let [q, k, v, dout] = [&inputs.q, &inputs.k, &inputs.v, &inputs.dout].map(Tensor::values);
        let given = given_out.values();
        let mut x = Formulas {
            out: Exact::zeros(q.len()),
            lse: Vec::new(),
            dq: Exact::zeros(q.len()),
            dk: Exact::zeros(k.len()),
            dv: Exact::zeros(k.len()),
        };
        let dot = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f64>();
        let dot_magnitudes = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| (a * b).abs()).sum::<f64>();
        for head in 0..batch * heads {
            let kv_head = head / heads * kv_heads + head % heads / (heads / kv_heads);
            for i in 0..seq {
                let at = (head * seq + i) * dim;
                let at_key = |j: usize| (kv_head * seq + j) * dim;
                let row = |x: &[f64], first: usize| x[first..first + dim].to_vec();
                let (q, dout) = (row(&q, at), row(&dout, at));
                let scores: Vec<f64> = (0..=i).map(|j| scale * dot(&q, &row(&k, at_key(j)))).collect();
                let max = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
                let lse = max + scores.iter().map(|s| (s - max).exp()).sum::<f64>().ln();
                x.lse.push(lse);
                let given = row(&given, at);
                let (delta, delta_parts) = (dot(&dout, &given), dot_magnitudes(&dout, &given));
                for (j, score) in scores.into_iter().enumerate() {
                    let (k, v) = (row(&k, at_key(j)), row(&v, at_key(j)));
                    let p = (score - lse).exp();
                    let ds = scale * p * (dot(&dout, &v) - delta);
                    let ds_parts = scale * p * (dot_magnitudes(&dout, &v) + delta_parts);
                    x.out.add(at, p, p, &v);
                    x.dq.add(at, ds, ds_parts, &k);
                    x.dk.add(at_key(j), ds, ds_parts, &q);
                    x.dv.add(at_key(j), p, p, &dout);
                }
            }
        }
        x
    }

    fn check(&self, got: &Outputs, tolerance: Tolerance) {
        self.out.check("out", &got.out, tolerance);
        for (at, (got, lse)) in got.lse.iter().zip(&self.lse).enumerate() {
            let bound = F32_ARITHMETIC * lse.abs().max(1.0);
            assert!((f64::from(*got) - lse).abs() <= bound, "lse[{at}]: {got}, expected {lse}");
        }
        self.dq.check("dq", &got.dq, tolerance);
        self.dk.check("dk", &got.dk, tolerance);
        self.dv.check("dv", &got.dv, tolerance);
    }
}

fn shape(batch: usize, heads: usize, kv_heads: usize, seq: usize, head_dim: usize) -> Shape {
    Shape { batch, heads, kv_heads, seq, head_dim }
}

fn shapes() -> Vec<Shape> {
    let mut shapes = Vec::new();
    for seq in [1, 2, 16, 17, 63, 64, 65, 130, 257] {
        for (n, head_dim) in [32, 64, 96, 128].into_iter().enumerate() {
            // Each sequence with grouped and with plain heads, if not at every head size.
            shapes.push(if (n + seq) % 2 == 0 {
                shape(2, 2, 2, seq, head_dim)
            } else {
                shape(1, 3, 1, seq, head_dim)
            });
        }
    }
    shapes.push(shape(1, 9, 3, 65, 64));
    shapes.push(shape(1, 1, 1, 80, 256));
    shapes
}

/// The vector path for `shape`, if this machine has one.
fn vector_path(shape: &Shape) -> Option<Path> {
    let path = Path::best(shape);
    let vector = !matches!(path, Path::Reference);
    assert_eq!(vector, is_fast() && supports(shape));
    if !vector {
        eprintln!("skipped: no AVX512-BF16");
    }
    vector.then_some(path)
}

#[test]
fn the_reference_follows_the_formulas() {
    for (n, shape) in shapes().into_iter().filter(|shape| shape.seq < 100).enumerate() {
        let inputs = Inputs::random(shape, LAYOUTS[n % 3], 1.0);
        let got = inputs.run(Path::Reference, 1);
        Formulas::of(&inputs, &got.out).check(&got, IN_F32);
    }
}

#[test]
fn the_vector_path_follows_the_formulas() {
    for (n, shape) in shapes().into_iter().enumerate() {
        let Some(path) = vector_path(&shape) else { return };
        let inputs = Inputs::random(shape, LAYOUTS[n % 3], 1.0);
        let got = inputs.run(path, 1);
        Formulas::of(&inputs, &got.out).check(&got, IN_BF16);
    }
}

#[test]
fn odd_head_sizes_take_the_reference() {
    let shape = shape(1, 2, 1, 5, 24);
    assert!(
        !supports(&shape)
            && !supports(&Shape { head_dim: 288, ..shape })
            && supports(&Shape { head_dim: 96, ..shape })
    );
    let inputs = Inputs::random(shape, Layout::PositionsFirst, 1.0);
    let (plain, chosen) = (inputs.run(Path::Reference, 1), inputs.run(Path::best(&shape), 1));
    assert_eq!((plain.out.bits(), plain.dk.bits()), (chosen.out.bits(), chosen.dk.bits()));
}

#[test]
fn the_public_functions_take_the_best_path() {
    let shape = shape(1, 2, 1, 33, 32);
    let inputs = Inputs::random(shape, Layout::HeadsFirst, 1.0);
    let expected = inputs.run(Path::best(&shape), 1);
    let Inputs { q, k, v, dout, .. } = &inputs;
    let (q, k, v) = (q.read(), k.read(), v.read());
    let blank = |heads| Tensor::blank(&shape, heads, Layout::HeadsFirst);
    let (mut out, mut dq, mut dk, mut dv) = (blank(2), blank(2), blank(1), blank(1));
    let mut lse = vec![0.0; 2 * 33];
    forward(Threads::ONE, shape, SCALE, q, k, v, out.write(), &mut lse);
    let grads = (dq.write(), dk.write(), dv.write());
    backward(Threads::ONE, shape, SCALE, q, k, v, out.read(), &lse, dout.read(), grads.0, grads.1, grads.2);
    assert_eq!(lse, expected.lse);
    for (got, expected) in [(out, expected.out), (dq, expected.dq), (dk, expected.dk), (dv, expected.dv)] {
        assert_eq!(got.bits(), expected.bits());
    }
}

#[test]
fn threads_and_strides_do_not_change_a_bit() {
    for shape in [shape(2, 6, 3, 130, 64), shape(1, 5, 5, 70, 32)] {
        let one = Inputs::random(shape, Layout::HeadsFirst, 1.0).run(Path::best(&shape), 1);
        for layout in LAYOUTS {
            let inputs = Inputs::random(shape, layout, 1.0);
            for threads in [1, 2, 3] {
                let got = inputs.run(Path::best(&shape), threads);
                assert_eq!(got.lse, one.lse);
                for (got, one) in
                    [(got.out, &one.out), (got.dq, &one.dq), (got.dk, &one.dk), (got.dv, &one.dv)]
                {
                    assert!(got.bits() == one.bits(), "{layout:?}, {threads} threads");
                }
            }
        }
    }
}

#[test]
fn the_three_of_a_fused_projection_share_memory() {
    // [seq, q heads + k heads + v heads, dim], read and written in place.
    let shape = shape(1, 4, 2, 50, 32);
    let apart = Inputs::random(shape, Layout::PositionsFirst, 1.0);
    let expected = apart.run(Path::best(&shape), 1);
    let width = (4 + 2 + 2) * 32;
    let strides = Strides { batch: 50 * width, head: 32, position: width };
    let fuse = |parts: [&Tensor; 3]| -> Vec<bf16> {
        let row = |i: usize| parts.into_iter().flat_map(move |x| &x.data[i * x.heads * 32..][..x.heads * 32]);
        (0..50).flat_map(row).copied().collect()
    };
    let fused = fuse([&apart.q, &apart.k, &apart.v]);
    let [q, k, v] = [0, 4 * 32, 6 * 32].map(|first| Operand::new(&fused[first..], strides));
    let mut grad = vec![bf16::NAN; fused.len()];
    let memory = grad.as_mut_ptr();
    // SAFETY: heads 0..4, 4..6 and 6..8 of each position: apart, and nobody else touches `grad` meanwhile.
    let [dq, dk, dv] = [0, 4 * 32, 6 * 32]
        .map(|first| unsafe { OperandMut::from_raw_parts(memory.add(first), fused.len() - first, strides) });
    let (out, dout) = (expected.out.read(), apart.dout.read());
    let threads = Threads::new(2).unwrap();
    backward(threads, shape, SCALE, q, k, v, out, &expected.lse, dout, dq, dk, dv);
    let bits = |x: &[bf16]| x.iter().map(|x| x.to_bits()).collect::<Vec<_>>();
    assert_eq!(bits(&grad), bits(&fuse([&expected.dq, &expected.dk, &expected.dv])));
}

#[test]
fn gaps_are_left_alone() {
    let shape = shape(2, 3, 1, 35, 64);
    let got = Inputs::random(shape, Layout::Padded, 1.0).run(Path::best(&shape), 2);
    for tensor in [got.out, got.dq, got.dk, got.dv] {
        let elements = tensor.elements();
        let written = tensor.data.iter().filter(|x| !x.is_nan()).count();
        assert_eq!(written, elements.len());
    }
}

#[test]
fn large_scores_pick_the_largest() {
    // Scores of some thousands: every probability is 0 or 1 but for near ties, and sums of exponentials would
    // overflow without the running maximum.
    let shape = shape(1, 2, 2, 150, 64);
    for path in [Some(Path::Reference), vector_path(&shape)].into_iter().flatten() {
        let inputs = Inputs::random(shape, Layout::HeadsFirst, 40.0);
        let got = inputs.run(path, 1);
        assert!(got.lse.iter().all(|lse| lse.is_finite()) && got.lse.iter().any(|lse| lse.abs() > 1000.0));
        let right = Formulas::of(&inputs, &got.out);
        // A score of 8000 is known to 5e-4 in f32, and so is a probability.
        let tolerance = Tolerance { terms: BF16_ROUNDING, parts: 2e-3 };
        right.out.check("out", &got.out, tolerance);
        right.dv.check("dv", &got.dv, tolerance);
        for tensor in [&got.dq, &got.dk] {
            assert!(tensor.values().iter().all(|x| x.is_finite()));
        }
    }
}

#[test]
fn a_bad_number_is_not_hidden() {
    let shape = shape(1, 1, 1, 40, 32);
    for path in [Some(Path::Reference), vector_path(&shape)].into_iter().flatten() {
        let mut inputs = Inputs::random(shape, Layout::HeadsFirst, 1.0);
        inputs.k.data[20 * 32 + 3] = bf16::NAN;
        let out = inputs.run(path, 1).out.values();
        assert!(out[..20 * 32].iter().all(|x| x.is_finite()), "earlier queries do not see it: {path:?}");
        assert!(out[20 * 32..].iter().all(|x| x.is_nan()), "later queries do: {path:?}");
    }
}

#[test]
fn nothing_is_computed_for_nothing() {
    for shape in [shape(0, 2, 1, 5, 32), shape(2, 2, 1, 0, 32)] {
        let got = Inputs::random(shape, Layout::HeadsFirst, 1.0).run(Path::best(&shape), 2);
        assert!(got.out.values().is_empty() && got.lse.is_empty());
    }
}
