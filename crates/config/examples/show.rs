fn main() {
    let a: Vec<String> = std::env::args().collect();
    match shardwise_config::RunConfig::load(a[1].as_ref(), &a[3..], a[2].parse().unwrap()) {
        Ok(l) => {
            print!("{}", l.effective());
            println!("{}", serde_json::to_string_pretty(&l.effective().to_json()).unwrap().lines().take(12).collect::<Vec<_>>().join("\n"));
            if let Err(e) = l.check_files() { println!("{e}") }
        }
        Err(e) => println!("{e}"),
    }
}
