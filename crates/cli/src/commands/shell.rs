//! Completions and man pages, made from the definition of the command line.

use crate::args::Args;
use crate::exit::{Exit, Failure};
use crate::show;
use clap::CommandFactory;
use clap_complete::Shell;
use std::path::Path;

/// `sterna completion`
pub(crate) fn completion(shell: Shell) -> Result<Exit, Failure> {
    let mut script = Vec::new();
    clap_complete::generate(shell, &mut Args::command(), "sterna", &mut script);
    show::print(&String::from_utf8_lossy(&script))?;
    Ok(Exit::Done)
}

/// `sterna man`
pub(crate) fn man(dir: Option<&Path>) -> Result<Exit, Failure> {
    let Some(dir) = dir else {
        let mut page = Vec::new();
        clap_mangen::Man::new(Args::command())
            .render(&mut page)
            .map_err(|why| unwritten("the page", &why))?;
        show::print(&String::from_utf8_lossy(&page))?;
        return Ok(Exit::Done);
    };
    std::fs::create_dir_all(dir)
        .and_then(|()| clap_mangen::generate_to(Args::command(), dir))
        .map_err(|why| unwritten(&dir.display().to_string(), &why))?;
    Ok(Exit::Done)
}

fn unwritten(what: &str, why: &std::io::Error) -> Failure {
    Failure::new(Exit::Failed, format!("{what} cannot be written: {why}"))
}
