//! A serial port of the guest, by its name, and the Unix socket at which QEMU serves its host's end.

use std::path::PathBuf;

use super::cmdline::CommandLine;
use super::keyval::Settings;

/// The socket behind the first virtio-serial port of this name, in a command line as it is executed. There is none where the
/// port has another kind of character device, one that QEMU connects by itself, or a path that is not absolute.
pub fn port_socket(argv: &[String], name: &str) -> Option<PathBuf> {
    let line = CommandLine::parse_any(argv.to_vec())?;
    let is = |settings: &Settings, key: &str, value: &str| settings.value(key).as_deref() == Some(value);
    let port = line
        .settings_of("device")
        .find(|device| is(device, "driver", "virtserialport") && is(device, "name", name))?;
    let chardev = port.value("chardev")?;
    let served = line.settings_of("chardev").find(|device| is(device, "id", &chardev))?;
    let path = served.value("path").map(PathBuf::from).filter(|path| path.is_absolute())?;
    (is(&served, "backend", "socket") && is_server(&served)).then_some(path)
}

/// `server=on`, or the old flag `server`.
fn is_server(settings: &Settings) -> bool {
    let pairs = settings.pairs();
    let last = pairs.iter().rev().find(|(key, _)| matches!(key.as_str(), "server" | "noserver"));
    last.is_some_and(|(key, value)| key == "server" && matches!(value.as_str(), "on" | "yes" | "true" | "y"))
}

#[cfg(test)]
mod tests {
    use super::*;

    const NAME: &str = "org.example.0";

    fn found(chardev: &str, device: &str) -> Option<PathBuf> {
        let line = ["qemu", "-device", "virtio-serial", "-device", device, "-chardev", chardev];
        port_socket(&line.map(str::to_owned), NAME)
    }

    #[test]
    fn a_port_leads_to_its_socket() {
        let device = "virtserialport,chardev=c,name=org.example.0";
        let json = r#"{"driver":"virtserialport","id":"p","chardev":"c","name":"org.example.0"}"#;
        for device in [device, json] {
            let path = found("socket,id=c,path=/srv/a,,b,server=on,wait=off", device);
            assert_eq!(path, Some("/srv/a,b".into()));
            assert_eq!(found("socket,id=c,path=/s,server,nowait", device), Some("/s".into()));
        }
    }

    #[test]
    fn what_cannot_be_connected_to_is_none() {
        let device = "virtserialport,chardev=c,name=org.example.0";
        for chardev in [
            "socket,id=c,path=/s",
            "socket,id=c,path=/s,server=off",
            "socket,id=c,path=s,server=on",
            "socket,id=c,host=h,port=1,server=on",
            "socket,id=c,fd=7,server=on",
            "socket,id=other,path=/s,server=on",
            "file,id=c,path=/s",
            "pty,id=c",
        ] {
            assert_eq!(found(chardev, device), None, "{chardev}");
        }
        let good = "socket,id=c,path=/s,server=on";
        for device in
            ["virtserialport,chardev=c,name=other", "virtserialport,chardev=c", "virtconsole,chardev=c"]
        {
            assert_eq!(found(good, device), None, "{device}");
        }
        assert_eq!(port_socket(&[], NAME), None);
    }
}
