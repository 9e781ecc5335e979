//! Each fused operation against its plain form, forward and every gradient, in f32 and in bf16.

use half::f16;
use shardwise_torch::{Device, Kind, Tensor, autograd, no_grad};

use super::*;
use crate::{Context, DeferredWeights, Randomness};

/// f32 forms differ in the order of additions only.
const F32: f64 = 2e-5;
/// f16 forms round at other places, to eleven places; where the processor has no f16, libtorch's products round every sum.
const F16: f64 = 1e-2;
/// bf16 forms round at other places: a few units in the last of eight places, of values of order one.
const BF16: f64 = 4e-2;

fn leaf(shape: &[i64], kind: Kind) -> Tensor {
    Tensor::randn(shape, (Kind::Float, Device::Cpu)).to_kind(kind).set_requires_grad(true)
}

fn tolerance(kind: Kind) -> f64 {
    match kind {
        Kind::Float => F32,
        Kind::Half => F16,
        _ => BF16,
    }
}

/// The output and all gradients of both forms are close, in units of the largest element of the plain one.
fn compare(
    name: &str,
    kind: Kind,
    inputs: &[&Tensor],
    fused: &dyn Fn() -> Tensor,
    plain: &dyn Fn() -> Tensor,
) {
    let tolerance = tolerance(kind);
    let (ours, theirs) = (fused(), plain());
    let dy = Tensor::randn(ours.size(), (Kind::Float, Device::Cpu)).to_kind(ours.kind());
    let grads = |y: &Tensor| autograd::grad(&[y], &[Some(&dy)], inputs).unwrap();
    let (our_grads, their_grads) = (grads(&ours), grads(&theirs));
    let mut pairs = vec![(ours, theirs)];
    pairs.extend(our_grads.into_iter().flatten().zip(their_grads.into_iter().flatten()));
    assert_eq!(pairs.len(), inputs.len() + 1, "{name}: every input has a gradient");
    for (i, (ours, theirs)) in pairs.iter().enumerate() {
        assert_eq!((ours.size(), ours.kind()), (theirs.size(), theirs.kind()), "{name} {i}");
        let (ours, theirs) = (ours.to_kind(Kind::Double), theirs.to_kind(Kind::Double));
        let largest = theirs.abs().max().double_value(&[]).max(1e-3);
        let gap = (&ours - &theirs).abs().max().double_value(&[]) / largest;
        assert!(gap <= tolerance, "{name} {kind:?}, value {i}: gap {gap:.2e} > {tolerance:.0e}");
    }
}

#[test]
fn fused_and_plain_forms_agree() {
    for kind in [Kind::Float, Kind::BFloat16, Kind::Half] {
        for (batch, seq, heads, kv_heads, width) in [(2, 17, 4, 2, 64), (1, 130, 3, 3, 32), (3, 1, 2, 1, 96)]
        {
            let x = leaf(&[batch, seq, heads * width], kind);
            let weight = leaf(&[heads * width], kind);
            compare(
                "rms_norm",
                kind,
                &[&x, &weight],
                &|| rms_norm(&asking(), &x, &weight, 1e-5).unwrap(),
                &|| rms_norm_plain(&x, &weight, 1e-5).unwrap(),
            );

            let (gate, up) = (leaf(&[batch, seq, 77], kind), leaf(&[batch, seq, 77], kind));
            let residual = leaf(&[batch, seq, heads * width], kind);
            let fused = || add_rms_norm(&asking(), &x, &residual, &weight, 1e-5).unwrap();
            let plain = || add_rms_norm_plain(&x, &residual, &weight, 1e-5).unwrap();
            let both = |[sum, norm]: [Tensor; 2]| sum * 0.5 + norm;
            let norm_only = |[_, norm]: [Tensor; 2]| norm;
            let inputs = [&x, &residual, &weight];
            compare("add_rms_norm", kind, &inputs, &|| both(fused()), &|| both(plain()));
            compare("its norm", kind, &inputs, &|| norm_only(fused()), &|| norm_only(plain()));
            compare("swiglu", kind, &[&gate, &up], &|| swiglu(&asking(), &gate, &up).unwrap(), &|| {
                swiglu_plain(&gate, &up).unwrap()
            });

            let rotary = Rotary { head_dim: width as usize, theta: 1e4, scaling: None };
            let table = rotary.table(200).unwrap();
            let q = leaf(&[batch, seq, heads, width], kind);
            compare("rotary", kind, &[&q], &|| table.rotate(&asking(), &q).unwrap(), &|| {
                table.rotate_plain(&q).unwrap()
            });

            let (k, v) =
                (leaf(&[batch, seq, kv_heads, width], kind), leaf(&[batch, seq, kv_heads, width], kind));
            compare("attention", kind, &[&q, &k, &v], &|| causal_attention(&q, &k, &v).unwrap(), &|| {
                causal_attention_plain(&q, &k, &v).unwrap()
            });

            let context = learning(batch);
            let dropout = Dropout::new("layer", "site", 0.3);
            compare("dropout", kind, &[&x], &|| dropout.apply(&context, &x).unwrap(), &|| {
                dropout.apply_plain(&context, &x).unwrap()
            });
            // Nothing is dropped at this rate, and attention goes the long way.
            let none = Dropout::new("layer", "site", 1e-9);
            // One position attends to itself alone: gradients of queries and keys are zero, and rounding is all of them.
            if seq > 1 {
                compare(
                    "attention with dropout",
                    kind,
                    &[&q, &k, &v],
                    &|| dropped_causal_attention(&context, &none, &q, &k, &v).unwrap(),
                    &|| causal_attention_plain(&q, &k, &v).unwrap(),
                );
            }

            let (weight, bias) = (leaf(&[31, heads * width], kind), leaf(&[31], kind));
            compare(
                "linear",
                kind,
                &[&x, &weight, &bias],
                &|| linear(&asking(), &x, &weight, Some(&bias)).unwrap(),
                &|| x.linear(&weight, Some(&bias)),
            );
            compare(
                "linear without bias",
                kind,
                &[&x, &weight],
                &|| linear(&asking(), &x, &weight, None).unwrap(),
                &|| x.linear(&weight, None::<Tensor>),
            );
            let turned = leaf(&[heads * width, 31], kind);
            compare(
                "conv1d",
                kind,
                &[&x, &turned, &bias],
                &|| conv1d(&asking(), &x, &turned, Some(&bias)).unwrap(),
                &|| x.matmul(&turned) + &bias,
            );

            let head = leaf(&[101, heads * width], kind);
            let target = Tensor::randint(101, [batch, seq], (Kind::Int64, Device::Cpu));
            compare(
                "head",
                kind,
                &[&x, &head],
                &|| linear_cross_entropy(&asking(), &x, &head, &target).unwrap(),
                &|| linear_cross_entropy_plain(&x, &head, &target).unwrap(),
            );
        }
    }
}

fn asking() -> Context<'static> {
    Context::inference(None)
}

/// A context in which rows are dropped from.
fn learning(num_rows: i64) -> Context<'static> {
    let random = Randomness { seed: 3, first_row: 40, num_rows: num_rows as usize };
    Context { random: Some(random), ..Context::inference(None) }
}

/// Whole attention matrices with elements dropped, in f64 and by hand.
#[test]
fn attention_drops_probabilities() {
    let (batch, seq, heads, width) = (2, 5, 3, 4);
    let [q, k, v] = [0; 3].map(|_| leaf(&[batch, seq, heads, width], Kind::Double));
    let dropout = Dropout::new("layer", "probabilities", 0.4);
    let context = learning(batch);
    let found = dropped_causal_attention(&context, &dropout, &q, &k, &v).unwrap();
    let ones = Tensor::ones([batch, heads, seq, seq], (Kind::Double, Device::Cpu));
    let mask = dropout.apply(&context, &ones).unwrap();
    let [q, k, v] = [&q, &k, &v].map(|x| x.transpose(1, 2));
    let scores = q.matmul(&k.transpose(2, 3)) / 2.0;
    let allowed = scores.exp() * scores.ones_like().tril(0);
    let probabilities = &allowed / allowed.sum_dim_intlist([-1].as_slice(), true, Kind::Double);
    let expected = (probabilities * mask).matmul(&v).transpose(1, 2);
    assert!((found - expected).abs().max().double_value(&[]) < 1e-12);
}

fn grads(loss: &Tensor, dloss: f64, inputs: &[&Tensor]) -> Vec<Tensor> {
    let dloss = loss.full_like(dloss);
    autograd::grad(&[loss], &[Some(&dloss)], inputs).unwrap().into_iter().map(Option::unwrap).collect()
}

/// The same loss whatever the chunks, and the same gradients but for the order of additions.
#[test]
fn chunks_of_rows_change_nothing_but_the_order_of_sums() {
    for kind in [Kind::Float, Kind::BFloat16, Kind::Half] {
        let (x, head) = (leaf(&[3, 11, 24], kind), leaf(&[2100, 24], kind));
        let target = Tensor::randint(2100, [3, 11], (Kind::Int64, Device::Cpu));
        let run = |chunk_rows| {
            let options = LinearCrossEntropy { chunk_rows: Some(chunk_rows), ..Default::default() };
            let loss = options.forward(&asking(), &x, &head, &target).unwrap();
            let asked = no_grad(|| options.forward(&asking(), &x, &head, &target).unwrap());
            assert_eq!(
                asked.double_value(&[]),
                loss.double_value(&[]),
                "asked or trained, {chunk_rows} rows"
            );
            let grads = grads(&loss, 1.0, &[&x, &head]);
            (loss.double_value(&[]), grads)
        };
        let (whole_loss, whole) = run(33);
        for chunk_rows in [1, 5, 16, 32, 100] {
            let (loss, grads) = run(chunk_rows);
            // Matrix products of other sizes add in another order.
            assert!((loss / whole_loss - 1.0).abs() < tolerance(kind) / 10.0, "{loss} {whole_loss}");
            for (grad, whole) in grads.iter().zip(&whole) {
                let gap = (grad.to_kind(Kind::Double) - whole.to_kind(Kind::Double)).norm().double_value(&[]);
                let gap = gap / whole.to_kind(Kind::Double).norm().double_value(&[]);
                assert!(gap < tolerance(kind), "{kind:?}, {chunk_rows} rows: {gap:.1e}");
            }
        }
    }
}

/// A loss scale that is told before is in the gradients before they are rounded: in f16 most would be next to nothing.
#[test]
fn the_loss_scale_reaches_gradients_before_they_are_rounded() {
    const SCALE: f64 = 4096.0;
    let target = Tensor::zeros([512], (Kind::Int64, Device::Cpu));
    let run = |kind: Kind, x: &Tensor, head: &Tensor, loss_scale, dloss| {
        let exact = |x: &Tensor| x.detach().to_kind(kind).set_requires_grad(true);
        let (x, head) = (exact(x), exact(head));
        let options = LinearCrossEntropy { chunk_rows: Some(200), loss_scale };
        // In f16 also where the processor would rather compute in f32.
        let loss = match kind {
            Kind::Half => options.fused::<f16>(&x, &head, &target, None).unwrap(),
            _ => options.forward(&asking(), &x, &head, &target).unwrap(),
        };
        let dhead = grads(&loss, dloss, &[&head]).remove(0);
        // Classes that are no target: small gradients.
        dhead.to_kind(Kind::Double).narrow(0, 1, 4000)
    };
    // Scores near zero: each class has about the same share of one, divided by the rows.
    let (x, head) = (leaf(&[512, 16], Kind::Half) * 0.05, leaf(&[4001, 16], Kind::Half));
    let exact = run(Kind::Double, &x, &head, 1.0, SCALE);
    let error = |loss_scale| {
        let found = run(Kind::Half, &x, &head, loss_scale, SCALE);
        ((found - &exact).norm() / exact.norm()).double_value(&[])
    };
    let (told, untold) = (error(SCALE), error(1.0));
    assert!(told < F16 && untold > 3.0 * told, "{told:.1e} {untold:.1e}");
    // Another scale than was told is made up for.
    let found = run(Kind::Float, &x, &head, SCALE, 2.0 * SCALE);
    assert!(((found / 2.0 - &exact).norm() / exact.norm()).double_value(&[]) < F32);
}

#[test]
fn frozen_tensors_have_no_gradient_of_the_head() {
    let target = Tensor::from_slice(&[1i64, 4, 0]);
    for chunk_rows in [2, 3] {
        let options = LinearCrossEntropy { chunk_rows: Some(chunk_rows), ..Default::default() };
        let (x, head) = (leaf(&[3, 8], Kind::Float), leaf(&[5, 8], Kind::Float));
        let whole = options.forward(&asking(), &x, &head, &target).unwrap();
        let whole = grads(&whole, 3.0, &[&x, &head]);
        let only_x = options.forward(&asking(), &x, &head.detach(), &target).unwrap();
        assert!(grads(&only_x, 3.0, &[&x])[0].equal(&whole[0]));
        let only_head = options.forward(&asking(), &x.detach(), &head, &target).unwrap();
        assert!(grads(&only_head, 3.0, &[&head])[0].equal(&whole[1]));
        let neither = options.forward(&asking(), &x.detach(), &head.detach(), &target).unwrap();
        assert!(!neither.requires_grad());
    }
}

/// Gradients that nobody asks for are not made.
#[test]
fn a_frozen_linear_map_passes_gradients_on() {
    for kind in [Kind::Float, Kind::Half] {
        let (x, weight) = (leaf(&[3, 8], kind), leaf(&[5, 8], kind));
        let frozen = linear(&asking(), &x, &weight.detach(), None).unwrap();
        let whole = linear(&asking(), &x, &weight, None).unwrap();
        assert!(grads(&frozen, 2.0, &[&x])[0].equal(&grads(&whole, 2.0, &[&x])[0]));
        assert!(!linear(&asking(), &x.detach(), &weight.detach(), None).unwrap().requires_grad());
    }
}

/// The backward pass for a zero-bubble schedule: the matrix's gradient is made of what was set aside, and is the same.
#[test]
fn a_gradient_that_waits_is_the_gradient() {
    for kind in [Kind::Float, Kind::BFloat16, Kind::Half] {
        let (x, bias) = (leaf(&[3, 5, 8], kind), leaf(&[6], kind));
        for (weight, is_turned) in [(leaf(&[6, 8], kind), false), (leaf(&[8, 6], kind), true)] {
            let map = |context: &Context<'_>| match is_turned {
                false => linear(context, &x, &weight, Some(&bias)).unwrap(),
                true => conv1d(context, &x, &weight, Some(&bias)).unwrap(),
            };
            let (deferred, at_once) = (DeferredWeights::default(), map(&asking()));
            let later = map(&Context { deferred: Some(&deferred), ..asking() });
            let dy = Tensor::randn(later.size(), (Kind::Float, Device::Cpu)).to_kind(kind);
            let expected = autograd::grad(&[&at_once], &[Some(&dy)], &[&x, &bias, &weight]).unwrap();
            assert!(deferred.waits(&weight) && !deferred.waits(&bias));
            assert!(deferred.grad(&weight).unwrap().is_none(), "nothing has gone backward yet");
            let mut found = autograd::grad(&[&later], &[Some(&dy)], &[&x, &bias]).unwrap();
            found.push(deferred.grad(&weight).unwrap());
            for (found, expected) in found.iter().zip(&expected) {
                let exact = |x: &Option<Tensor>| x.as_ref().unwrap().to_kind(Kind::Double);
                let gap = (exact(found) - exact(expected)).norm() / exact(expected).norm();
                assert!(gap.double_value(&[]) < tolerance(kind), "{kind:?}");
            }
        }
    }
}

#[test]
fn a_target_that_is_no_class_is_an_error() {
    let (x, head) = (leaf(&[2, 8], Kind::Float), leaf(&[5, 8], Kind::Float));
    for chunk_rows in [1, 2] {
        let options = LinearCrossEntropy { chunk_rows: Some(chunk_rows), ..Default::default() };
        let error =
            options.forward(&asking(), &x, &head, &Tensor::from_slice(&[1i64, 5])).unwrap_err().to_string();
        assert!(error.contains("target `5` of row `1`"), "{error}");
    }
}
