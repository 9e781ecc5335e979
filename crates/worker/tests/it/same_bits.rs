//! Ranks as processes and ranks as threads are the same ranks.

use shardwise_comm::thread;
use shardwise_data::{BatchShape, Loader, Order, TokenDType, TokenFile};
use shardwise_device::DType;
use shardwise_engine::{Batch, BoxError, Engine, EngineOptions};
use shardwise_models::{HfSource, build, read_config, save_hf};
use shardwise_plan::ZeroStage;
use shardwise_torch::{Tensor, set_num_threads};
use shardwise_zero::{AdamOptions, BiasCorrection, Optimizer, ZeroOptions};

use crate::case::{Case, Curve, fixture, read_json};
use crate::ranks::Ranks;

const WORLD_SIZE: usize = 3;

#[test]
fn ranks_as_threads_and_as_processes_train_the_same_bits() {
    for case in [Case::new(3), Case { bf16: true, ..Case::new(2) }] {
        let case = Case { steps: 6, accum: 2, micro_batch: 2, ..case };
        let ended = Ranks::new(&case.run_file(), WORLD_SIZE).run();
        let (curve, model) = as_threads(case);
        assert_eq!(ended.curve(), curve, "{case:?}");
        assert!(ended.model() == model, "{case:?}: the trained models differ");
    }
}

/// What the worker does, without the worker.
fn as_threads(case: Case) -> (Curve, Vec<u8>) {
    let dir = tempfile::tempdir().unwrap();
    let hyper = read_json(&fixture("case.json"));
    let number = |key: &str| hyper[key].as_f64().unwrap();
    let options = EngineOptions::new(ZeroOptions {
        compute: if case.bf16 { DType::Bf16 } else { DType::F32 },
        grad_accum_steps: case.accum,
        clip_grad_norm: Some(number("clip")),
        ..ZeroOptions::new(
            ZeroStage::ALL[case.stage],
            Optimizer::AdamW(AdamOptions {
                beta1: hyper["betas"][0].as_f64().unwrap(),
                beta2: hyper["betas"][1].as_f64().unwrap(),
                eps: number("eps"),
                weight_decay: number("weight_decay"),
                bias_correction: BiasCorrection::On,
            }),
        )
    });
    let shape = BatchShape {
        seq_len: hyper["seq_len"].as_u64().unwrap() as usize,
        micro_batch: case.micro_batch,
        grad_accum_steps: case.accum,
        data_parallel: WORLD_SIZE,
    };
    let mut curves = thread::run(WORLD_SIZE, |group| {
        set_num_threads(1);
        let rank = group.group_rank();
        let tokens = TokenFile::open(fixture("tokens.bin"), TokenDType::U16).unwrap();
        let loader = Loader::new(tokens, Order::Sequential, shape).unwrap();
        let (config, json) = read_config(&fixture("model")).unwrap();
        let mut source = HfSource::open(&fixture("model"), &config.layers()).unwrap();
        let mut engine = Engine::new(build(&config).unwrap(), options.clone(), group, &mut source).unwrap();
        let mut curve = Curve { losses: vec![], grad_norms: vec![] };
        for step in 0..case.steps as u64 {
            let batch = |microbatch| -> Result<Batch, BoxError> {
                let batch = loader.batch(step, microbatch, rank)?;
                let tensor = |tokens: &[i64]| -> Result<Tensor, BoxError> {
                    Ok(Tensor::f_from_slice(tokens)?.f_view([batch.rows as i64, -1])?)
                };
                Ok(Batch { input: tensor(&batch.input)?, target: tensor(&batch.target)?, first_row: 0 })
            };
            let report = engine.train_step(number("lr"), batch).unwrap();
            curve.losses.push(report.loss);
            curve.grad_norms.push(report.step.grad_norm);
        }
        save_hf(&mut engine, dir.path(), &json).unwrap();
        curve
    });
    let first = curves.remove(0);
    assert!(curves.iter().all(|curve| *curve == first), "ranks report different numbers");
    (first, std::fs::read(dir.path().join("model.safetensors")).unwrap())
}
