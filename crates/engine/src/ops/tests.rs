//! Each fused operation against its plain form, forward and every gradient, in f32 and in bf16.

use shardwise_torch::{Device, Kind, Tensor, autograd};

use super::*;

/// f32 forms differ in the order of additions only.
const F32: f64 = 2e-5;
/// bf16 forms round at other places: a few units in the last of eight places, of values of order one.
const BF16: f64 = 4e-2;

fn leaf(shape: &[i64], kind: Kind) -> Tensor {
    Tensor::randn(shape, (Kind::Float, Device::Cpu)).to_kind(kind).set_requires_grad(true)
}

/// The output and all gradients of both forms are close, in units of the largest element of the plain one.
fn compare(
    name: &str,
    kind: Kind,
    inputs: &[&Tensor],
    fused: &dyn Fn() -> Tensor,
    plain: &dyn Fn() -> Tensor,
) {
    let tolerance = if kind == Kind::Float { F32 } else { BF16 };
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
    for kind in [Kind::Float, Kind::BFloat16] {
        for (batch, seq, heads, kv_heads, width) in [(2, 17, 4, 2, 64), (1, 130, 3, 3, 32), (3, 1, 2, 1, 96)]
        {
            let x = leaf(&[batch, seq, heads * width], kind);
            let weight = leaf(&[heads * width], kind);
            compare("rms_norm", kind, &[&x, &weight], &|| rms_norm(&x, &weight, 1e-5).unwrap(), &|| {
                rms_norm_plain(&x, &weight, 1e-5).unwrap()
            });

            let (gate, up) = (leaf(&[batch, seq, 77], kind), leaf(&[batch, seq, 77], kind));
            compare("swiglu", kind, &[&gate, &up], &|| swiglu(&gate, &up).unwrap(), &|| {
                swiglu_plain(&gate, &up).unwrap()
            });

            let rotary = Rotary { head_dim: width as usize, theta: 1e4, scaling: None };
            let table = rotary.table(200).unwrap();
            let q = leaf(&[batch, seq, heads, width], kind);
            compare("rotary", kind, &[&q], &|| table.rotate(&q).unwrap(), &|| {
                table.rotate_plain(&q).unwrap()
            });

            let (k, v) =
                (leaf(&[batch, seq, kv_heads, width], kind), leaf(&[batch, seq, kv_heads, width], kind));
            compare("attention", kind, &[&q, &k, &v], &|| causal_attention(&q, &k, &v).unwrap(), &|| {
                causal_attention_plain(&q, &k, &v).unwrap()
            });

            let head = leaf(&[101, heads * width], kind);
            let target = Tensor::randint(101, [batch, seq], (Kind::Int64, Device::Cpu));
            compare(
                "head",
                kind,
                &[&x, &head],
                &|| linear_cross_entropy(&x, &head, &target).unwrap(),
                &|| linear_cross_entropy_plain(&x, &head, &target).unwrap(),
            );
        }
    }
}

#[test]
fn a_target_that_is_no_class_is_an_error() {
    let (x, head) = (leaf(&[2, 8], Kind::Float), leaf(&[5, 8], Kind::Float));
    let error = linear_cross_entropy(&x, &head, &Tensor::from_slice(&[1i64, 5])).unwrap_err();
    assert!(error.to_string().contains('5'), "{error}");
}
