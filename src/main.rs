//! Parses the command line, calls one function, turns its error into an exit code.

use std::process::ExitCode;

use strait::config::args::{Cli, Command};

fn main() -> ExitCode {
    let cli = Cli::read(std::env::args_os()).unwrap_or_else(|error| error.exit());
    let done = match cli.command {
        None => strait::serve::serve(None, &cli.serve),
        Some(Command::Serve(serve)) => strait::serve::serve(serve.model.as_ref(), &serve.flags),
        Some(Command::Plan(plan)) => strait::serve::offline::plan(&plan),
        Some(Command::Compress(compress)) => strait::serve::offline::compress(&compress),
        Some(Command::Eval(eval)) => strait::serve::eval::eval(&eval),
        Some(Command::Adapter(adapter)) => strait::serve::adapters::adapter(&adapter),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) if closed_pipe(&error) => ExitCode::SUCCESS,
        Err(error) => {
            // One sentence: causes are joined, but for those that a message already spells out.
            let mut message = error.to_string();
            for cause in error.chain().skip(1).map(ToString::to_string) {
                if !message.contains(&cause) {
                    message = format!("{message}: {cause}");
                }
            }
            eprintln!("strait: {message}");
            ExitCode::FAILURE
        }
    }
}

/// Whether the reader of our output went away, as `| head` does.
fn closed_pipe(error: &anyhow::Error) -> bool {
    error.chain().any(|e| e.downcast_ref::<std::io::Error>().is_some_and(|e| e.kind() == std::io::ErrorKind::BrokenPipe))
}
