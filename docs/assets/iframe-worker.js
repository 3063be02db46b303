// The search runs in a Worker, which browsers do not start for a page that is opened from disk. There a hidden frame
// takes its place: messages to it wait until its script has been loaded.
if (location.protocol === "file:") {
  window.Worker = class extends EventTarget {
    constructor(address) {
      super();
      const frame = document.createElement("iframe");
      frame.hidden = true;
      document.body.append(frame);
      const inner = frame.contentWindow;
      inner.postMessage = (data) => this.dispatchEvent(new MessageEvent("message", { data }));
      const script = inner.document.createElement("script");
      script.src = address;
      this.target = new Promise((loaded) => { script.onload = () => loaded(inner); });
      inner.document.body.append(script);
    }

    postMessage(data) {
      this.target.then((inner) => inner.dispatchEvent(new inner.MessageEvent("message", { data })));
    }
  };
}
