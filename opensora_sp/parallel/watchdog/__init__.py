"""If any rank dies, hangs or fails, all ranks exit within seconds."""
