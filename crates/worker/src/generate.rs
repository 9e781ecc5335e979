//! `shardwise generate`: a trained model continues a text, on one rank.

use std::io::Write;

use crate::GenerateArgs;
use crate::failure::Failure;
use crate::inference::Trained;
use crate::sampling::{Sampling, continue_tokens};

pub fn run(args: &GenerateArgs) -> Result<(), Failure> {
    let Trained { config, tokenizer, mut engine } = Trained::load(&args.dir)?;
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
