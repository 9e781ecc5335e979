//! `shardwise generate`: a trained model continues a text, on one rank.

use std::io::Write;

use shardwise_comm::solo;
use shardwise_data::Tokenizer;
use shardwise_device::DType;
use shardwise_engine::{Engine, EngineOptions};
use shardwise_kernels::Threads;
use shardwise_models::{HfSource, read_config};
use shardwise_plan::ZeroStage;
use shardwise_zero::{AdamOptions, BiasCorrection, Optimizer, Overlap, StatePrecision, ZeroOptions};

use crate::GenerateArgs;
use crate::failure::Failure;
use crate::sampling::{Sampling, continue_tokens};

pub fn run(args: &GenerateArgs) -> Result<(), Failure> {
    let (config, _) = read_config(&args.dir).map_err(Failure::configuration)?;
    let tokenizer = Tokenizer::load(args.dir.join("tokenizer.json")).map_err(Failure::configuration)?;
    let layers = config.layers();
    let mut source = HfSource::open(&args.dir, &layers).map_err(Failure::configuration)?;
    let zero = ZeroOptions {
        stage: ZeroStage::Zero,
        compute: DType::F32,
        grad_accum_steps: 1,
        clip_grad_norm: None,
        optimizer: Optimizer::AdamW(AdamOptions {
            beta1: 0.9,
            beta2: 0.999,
            eps: 1e-8,
            weight_decay: 0.0,
            bias_correction: BiasCorrection::On,
        }),
        groups: vec![],
        states: StatePrecision::F32,
        overlap: Overlap::Inline,
        threads: Threads::ONE,
        loss_scaling: None,
        on_non_finite: Default::default(),
        reduction: Default::default(),
    };
    // Nothing is trained, so there are no gradients and no optimizer states.
    let options = EngineOptions { zero, frozen: vec!["*".into()], activations: Default::default(), seed: 0 };
    let mut engine = Engine::new(shardwise_models::build(&config)?, options, solo(), &mut source)?;

    let mut tokens: Vec<i64> = tokenizer.encode_prompt(&args.prompt)?.into_iter().map(i64::from).collect();
    if tokens.is_empty() {
        return Err(Failure::usage("the prompt has no tokens", "give at least one character"));
    }
    let sampling = Sampling { temperature: args.temperature, top_k: args.top_k, seed: args.seed };
    let mut stdout = std::io::stdout().lock();
    write!(stdout, "{}", args.prompt)?;
    stdout.flush()?;
    let end = tokenizer.end_of_text();
    let mut stream = tokenizer.stream();
    let mut broken = None;
    continue_tokens(&mut engine, &mut tokens, args.max_tokens, config.max_positions(), sampling, |token| {
        if end.is_some_and(|end| i64::from(end) == token) {
            return false;
        }
        let shown = stream.push(token as u32).map_err(anyhow::Error::from).and_then(|text| {
            write!(stdout, "{text}")?;
            Ok(stdout.flush()?)
        });
        broken = shown.err();
        broken.is_none()
    })?;
    if let Some(error) = broken {
        return Err(error.into());
    }
    writeln!(stdout, "{}", stream.finish()?)?;
    Ok(())
}
